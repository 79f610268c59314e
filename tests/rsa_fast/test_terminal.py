"""What a person at a terminal sees: each test runs the command on a pseudo-terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shlex
import struct
import sys
import termios

import click
import pytest

from rsa_fast import cli, terminal
from rsa_fast.cli import main
from rsa_fast.methods import FILES
from rsa_fast.recipes import Recipe, meanings, recipe_type
from tests.helpers import invoke


def on_terminal(*arguments: object, columns: int = 80) -> tuple[int, str]:
    """The exit code of a command on a terminal, and what it shows without the control codes."""
    child, terminal_file = pty.fork()
    if child == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.environ |= {"TERM": "xterm"}
        os.environ.pop("COLUMNS", None)
        command = [sys.executable, "-m", "rsa_fast", *map(str, arguments)]
        os.execv(sys.executable, command)
    shown = b""
    while True:
        try:
            shown += (part := os.read(terminal_file, 65536))
        except OSError:  # the terminal's other end is closed
            break
        if not part:
            break
    os.close(terminal_file)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", shown.decode())
    return code, text.replace("\r\n", "\n")


def test_a_terminal_gets_a_table_where_a_pipe_gets_json_too(tmp_path):
    arguments = ("runs", str(tmp_path))
    code, shown = on_terminal(*arguments)
    assert code == 0 and shown == "no runs here: rsa-fast train my_photos starts one\n"
    piped = invoke(main, *arguments).stdout.splitlines()
    assert piped[:-1] == shown.splitlines() and json.loads(piped[-1]) == {"runs": []}
    code, shown = on_terminal(*arguments, "--json")
    assert json.loads(shown) == {"runs": []}


def test_a_run_ends_in_three_lines_scores_places_and_the_next_command(tmp_path):
    out = tmp_path / "a run"
    out.mkdir()
    scores = [(0, 33.333), (10, 45.833), (20, 37.5)]
    (out / "metrics.jsonl").write_text(
        "".join(f'{{"step": {s}, "epoch": {s // 10}, "knn_top1": {knn}}}\n' for s, knn in scores)
    )
    (out / "result.json").touch()
    classes = dict.fromkeys("abcd", 50.0)
    result = {"out": str(out), "method": "rsa", "step": 20, "images_per_s": 46.123456}
    result |= {"knn_top1": 37.5, "knn20_top1": 37.5, "linear_top1": 41.66667}
    assert terminal.result_lines("train", result | {"knn_per_class": classes}).splitlines() == [
        "done   kNN 37.5 (chance 25.0, at the start 33.3, best 45.8 at epoch 1)   linear 41.7",
        f"files  {out}: result.json",
        f"next   rsa-fast embed --checkpoint '{out}' --out embeddings.csv",
    ]
    result = {"out": "e.csv", "rows": 12_345, "dim": 512, "seconds": 3.0, "images_per_s": 46.123456}
    assert terminal.result_lines("embed", result).splitlines() == [
        "done   12,345 rows, 512 features in each, 46.1 images/s",
        "files  e.csv",
        "next   rsa-fast neighbours --embeddings e.csv --out neighbours.html",
    ]


def test_every_next_command_is_one():
    for form in terminal.NEXT.values():
        words = shlex.split(form.format(out="x", checkpoint="x", data=" --data x"))
        parsed(words)


def parsed(words: list[str]) -> None:
    """Raise unless the words are a command of ours whose options all exist."""
    name, command, *arguments = words
    assert name == "rsa-fast"
    context = click.Context(main.commands[command], info_name=command)
    main.commands[command].make_parser(context).parse_args(arguments)


@pytest.mark.parametrize(
    "name", [name for name, command in main.commands.items() if isinstance(command, cli.Command)]
)
def test_help_has_examples_that_exist_and_the_terminal_s_width(name, monkeypatch):
    group = click.Context(main, info_name="rsa-fast", **main.context_settings)
    command = main.commands[name]
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        shown = command.get_help(click.Context(command, parent=group, info_name=name))
        longest = max(map(len, shown.splitlines()))
        assert longest <= columns and (name != "train" or longest > 0.8 * columns)
    examples = re.findall(r"^    (rsa-fast .*)$", shown.partition("For example:")[2], re.M)
    assert examples
    for example in examples:
        assert example.split()[1] == name
        parsed(shlex.split(example))


def test_the_first_line_names_method_images_folder_and_device_before_torch_is_imported(tmp_path):
    """The command is the real one, but for torch: its import fails."""
    (tmp_path / "torch.py").write_text("raise ImportError('this torch is asked too early')")
    (tmp_path / "photos").mkdir()
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        patch.chdir(tmp_path)
        code, shown = on_terminal("train", "photos", "--method", "byol", "--nproc", 2)
    first, *others = shown.splitlines()
    assert first.split("   ") == [
        "rsa-fast train",
        "method byol",
        "images photos",
        "out runs/photos-byol",
        "device cpu, 2 processes",
    ]
    assert code == 1 and "asked too early" in " ".join(others)


def test_every_field_of_every_recipe_has_a_meaning():
    for name in FILES:
        kind = recipe_type(name)
        meaning = meanings(kind)
        views = {f"views.{field}" for field in kind.model_fields["views"].annotation.__match_args__}
        assert meaning.keys() >= {*kind.model_fields, *views}
        assert not any("---" in text for text in meaning.values())


def test_a_meaning_is_the_comment_behind_the_field_or_above_it():
    class OwnRecipe(Recipe):
        """A recipe of somebody's own file."""

        # --- A part of the class
        # The first line
        # and the second.
        above: int = 1
        behind: int = 2  # the weight

        in_two_lines: dict[str, int] = {  # noqa: RUF012
            "a": 1,
        }  # the end
        none: int = 3

    meaning = meanings(OwnRecipe)
    assert meaning["above"] == "The first line and the second."
    assert meaning["behind"] == "the weight" and meaning["in_two_lines"] == "the end"
    assert "none" not in meaning and meaning["width"].startswith("channels of the first stage")


def test_a_recipe_is_shown_with_meaning_and_source_in_80_columns():
    code, shown = on_terminal("recipes", "cifar100/byol")
    assert code == 0 and max(map(len, shown.splitlines())) <= 80 and "{" not in shown
    rows = re.split(r"\n (?=\S)", shown)
    (epochs,) = [row for row in rows if row.startswith("epochs ")]
    assert "200" in epochs and "the number of times that every" in epochs
    assert "source: PAPER 4.1" in epochs
    (blur,) = [row for row in rows if row.startswith("views.blur_p ")]
    assert "0.5" in blur and "Gaussian blur" in blur and "source" not in blur  # a default


def test_an_indented_line_is_broken_between_words_and_a_command_is_not(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    line = "  numbers   steps_per_epoch 5  total_steps 10  peak_lr 0.003125  batch_per_gpu 4"
    first, second = terminal.wrapped(line).splitlines()
    assert (first, second) == (
        "  numbers   steps_per_epoch 5  total_steps 10  peak_lr",
        "            0.003125  batch_per_gpu 4",
    )
    command = "rsa-fast eval knn --checkpoint " + "x" * 60
    assert terminal.wrapped(command) == command
