"""What the README shows works: its commands parse, its method trains."""

from __future__ import annotations

import importlib
import re
import shlex

import click
import pytest
import torch
from conftest import ROOT

README = (ROOT / "README.md").read_text()
TOOL = r"(?:rsa-fast|python -m tools\.\w+)"
LINES = re.findall(rf"^(?:srun )?(?:\.venv/bin/)?({TOOL} [^\n]*?)(?: {{2,}}#.*)?(?: \\)?$", README, re.M)
COMMANDS = LINES + re.findall(rf"`({TOOL}(?: [^`]*)?)`", README)


def parse(command: click.Command, arguments: list[str]) -> None:
    """Raise when the command has no such option or argument; values are not looked at."""
    with click.Context(command) as ctx:
        rest = command.make_parser(ctx).parse_args(list(arguments))[1]
        if isinstance(command, click.Group) and rest:
            _, sub, rest = command.resolve_command(ctx, rest)
            parse(sub, rest)
        else:
            assert not rest, rest


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_in_the_readme_parse(line):
    from rsa_fast.cli import main

    words = shlex.split(line.replace("\\", ""), comments=True)
    command = main if words[0] == "rsa-fast" else importlib.import_module(words[2]).main
    parse(command, words[1 if words[0] == "rsa-fast" else 3 :])


def test_there_are_commands_to_try():
    assert len(COMMANDS) > 15


def test_the_method_in_the_readme_trains_and_is_barlow_twins():
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "class BarlowTwins" in block]
    space: dict = {}
    exec(code, space)
    from pipelines.views import Batch
    from rsa_fast.networks import Encoder

    torch.manual_seed(0)
    method = space["BarlowTwins"](Encoder("resnet18", "cifar", 4), 16, 3, 0.005)
    views = {f"aggressive_{i}": torch.randn(6, 3, 8, 8) for i in (1, 2)}
    batch = Batch(torch.zeros(6, dtype=torch.int64), weak_1=None, weak_2=None, **views)
    optimizer = torch.optim.SGD(method.parameters(), 0.1)
    losses = []
    for step in range(20):
        loss = method(batch, 0.0)
        if step == 0:
            z = [method.online(view) for view in views.values()]
            z = [((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()).tolist() for x in z]
            total = 0.0
            for i in range(3):
                for j in range(3):
                    c = sum(z[0][n][i] * z[1][n][j] for n in range(6)) / 6
                    total += (c - 1) ** 2 if i == j else 0.005 * c**2
            assert loss.total.item() == pytest.approx(total, rel=1e-4)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.total.item())
    assert losses[-1] < 0.5 * losses[0]
