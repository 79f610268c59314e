"""What users type: the Python API in a notebook, and the command line."""

from __future__ import annotations

import doctest
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from types import ModuleType
from typing import get_args

import click
import pytest

import rsa_fast
from rsa_fast import cli, methods, recipes
from rsa_fast.cli import main
from rsa_fast.datasets import DATASETS
from rsa_fast.evaluation import encoders
from rsa_fast.evaluation.evaluate import PROTOCOLS, evaluate
from rsa_fast.evaluation.export import SUFFIXES
from rsa_fast.evaluation.finetune import PRESETS
from rsa_fast.insight import planning
from rsa_fast.methods import ABLATIONS, METHODS, method_class
from rsa_fast.methods.method import Method
from rsa_fast.pipelines import BACKENDS, OnBadImage
from rsa_fast.pipelines.layouts import SPLITS
from rsa_fast.training import engine
from tests.helpers import ROOT, invoke, write_folder

# The others are those of tools/, of which the command line only has the names.
OWN = sorted(name for name, command in main.commands.items() if isinstance(command, cli.Command))
SCALES = {"all"} | {scale for dataset in DATASETS.values() for scale in dataset.scales}


def python(code: str, **env: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | env
    ).stdout


def test_the_lines_for_a_notebook_run_as_they_stand(tmp_path, monkeypatch):
    write_folder(tmp_path / "data" / "cifar10", {"train": 20, "test": 10}, size=(32, 32))
    monkeypatch.chdir(tmp_path)
    (test,) = doctest.DocTestFinder(recurse=False).find(rsa_fast, "rsa_fast")
    assert len(test.examples) >= 10
    output: list[str] = []
    found = doctest.DocTestRunner().run(test, out=output.append)
    assert (found.failed, found.attempted) == (0, len(test.examples)), "".join(output)


def test_the_package_imports_what_is_asked_for_and_no_more():
    assert python("import sys, rsa_fast; print('torch' in sys.modules)") == "False\n"
    assert (rsa_fast.train, rsa_fast.load_encoder) == (engine.train, encoders.load_encoder)
    assert rsa_fast.evaluate is evaluate
    assert dir(rsa_fast) == sorted(rsa_fast.__all__) and "Callback" in dir(rsa_fast)
    with pytest.raises(AttributeError, match="module 'rsa_fast' has no attribute 'trian'"):
        rsa_fast.trian  # noqa: B018


@pytest.mark.parametrize("words", ["--help", "train --help", "--version"])
def test_help_imports_none_of_what_takes_time(words):
    slow = {"torch", "numpy", "pydantic", "matplotlib", "rich", "numba", "yaml"}
    code = f"import sys, rsa_fast.cli as c; c.main({words.split()}, standalone_mode=False); "
    code += f"print({slow} & sys.modules.keys())"
    assert python(code).splitlines()[-1] == "set()"


def test_a_command_keeps_torch_out_of_the_garbage_collection():
    code = "import gc, rsa_fast.cli as c; c.main(['recipes', 'cifar10'], standalone_mode=False); "
    code += "import torch; seen = any(x is torch.nn.Module for x in gc.get_objects()); "
    code += "print(gc.isenabled(), gc.get_freeze_count() > 100_000, seen)"
    assert python(code).splitlines()[-1] == "True True False"


def test_every_file_of_the_methods_is_a_method_with_its_recipe_and_rows():
    files = {path.stem for path in (ROOT / "rsa_fast" / "methods").glob("*.py")} - {
        "__init__",
        "method",
    }
    assert {name.replace("-", "_") for name in METHODS} == files
    for name in METHODS:
        method = method_class(name)
        assert issubclass(method, Method) and issubclass(method.recipe_type, recipes.Recipe)
        assert "all" in method.rows and set(method.rows) <= SCALES
        cited = {field for row in method.rows.values() for field in row}
        assert cited <= set(method.recipe_type.model_fields)
    assert {ABLATIONS[name][0] for name in ABLATIONS} <= set(METHODS)


def test_a_file_of_the_methods_without_one_method_is_named(monkeypatch):
    module = ModuleType("rsa_fast.methods.broken")
    module.__file__ = "methods/broken.py"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(methods.FILES, "broken", "broken")
    with pytest.raises(
        ValueError, match=r"broken\.py: found none; a method needs exactly one class with `rows`"
    ):
        method_class("broken")
    for name in ("One", "Two"):
        setattr(module, name, type(name, (), {"rows": {}, "__module__": module.__name__}))
    with pytest.raises(ValueError, match="found One, Two"):
        method_class("broken")


def test_the_names_that_are_listed_without_torch_are_those_of_their_tables():
    assert list(cli.GPUS) == list(planning.GPUS)
    assert set(cli.FORMATS) == set(SUFFIXES)
    assert list(cli.FINETUNE_PRESETS) == list(PRESETS)
    names = {(command, param.name): set(param.type.choices) for command, param in named()}
    assert {f"linear-{name}" for name in names["eval", "variant"]} | {"knn"} == set(PROTOCOLS)
    assert names["train", "on_bad_image"] == set(get_args(OnBadImage))
    assert names["embed", "split"] == names["neighbours", "split"] == set(SPLITS)
    for field in ("device", "precision"):
        assert names["detect", field] == set(
            get_args(recipes.Recipe.model_fields[field].annotation)
        )


def named():
    """Return every option and argument that is one of a few names, with its command's name."""
    params = [(name, param) for name, command in main.commands.items() for param in command.params]
    return [(name, param) for name, param in params if isinstance(param.type, click.Choice)]


@pytest.mark.parametrize(
    ("command", "param"), named(), ids=lambda x: x if isinstance(x, str) else x.name
)
def test_a_mistyped_name_is_told_the_nearest(command, param):
    for name in param.type.choices:
        typed = name + "q"
        done = invoke(main, command, *[param.opts[0]] * (param.param_type_name == "option"), typed)
        assert (
            done.exit_code == 1
            and f"no {param.type.name} {typed!r} (did you mean {name!r}?)" in done.output
        )
        assert (
            all(other in done.output for other in param.type.choices)
            and done.output.count("\n") == 1
        )


@pytest.mark.parametrize("name", sorted(main.commands))
def test_a_mistyped_command_or_option_is_told_the_nearest(name):
    done = invoke(main, name[:-2] + name[-1] + name[-2])
    assert done.exit_code == 2 and re.search(f"Did you mean .*'{name}'", done.output)
    for option in [
        opt for param in main.commands[name].params for opt in param.opts if opt.startswith("--")
    ]:
        done = invoke(main, name, option + "q")
        assert done.exit_code == 2 and re.search(f"Did you mean .*'{option}'", done.output)


@pytest.mark.parametrize("name", OWN)
def test_help_shows_every_option_once_in_its_section(name):
    command = main.commands[name]
    shown = invoke(main, name, "--help").output
    titles = [
        getattr(param, "section", "Options")
        for param in command.params
        if param.param_type_name == "option"
    ]
    sections = dict(
        zip(
            (parts := re.split(r"^(\w[\w ]*):\n", shown, flags=re.M))[1::2],
            parts[2::2],
            strict=True,
        )
    )
    assert sections.keys() == {*titles, "Options"}
    for param in command.params:
        if param.param_type_name == "option":
            lines = [
                title
                for title, text in sections.items()
                if re.search(rf"^  {param.opts[0]}\b(?!-)", text, re.M)
            ]
            assert lines == [getattr(param, "section", "Options")]


def failing(monkeypatch, tmp_path, name, error, *words):
    def fail(**_):
        raise error

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(main.commands[name], "params", [])
    monkeypatch.setattr(main.commands[name], "callback", fail)
    return invoke(main, *words, name)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(
    "error", [ValueError("a fault"), FileNotFoundError("a fault"), FloatingPointError("a fault")]
)
def test_an_error_is_its_message(monkeypatch, tmp_path, name, error):
    done = failing(monkeypatch, tmp_path, name, error)
    assert (done.exit_code, done.output) == (1, "Error: a fault\n") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a fault"),
        KeyError("a fault"),
        MemoryError("a fault"),
        StopIteration("a fault"),
    ],
)
def test_an_error_that_nobody_foresaw_is_named_and_its_traceback_kept(
    monkeypatch, tmp_path, name, error
):
    done = failing(monkeypatch, tmp_path, name, error)
    assert (
        done.exit_code == 1
        and done.output.startswith(f"Error: {type(error).__name__}: ")
        and "a fault" in done.output
    )
    (file,) = tmp_path.iterdir()
    assert str(file) in done.output and "Traceback" not in done.output
    assert file.read_text().startswith("Traceback") and "in fail\n" in file.read_text()


@pytest.mark.parametrize("error", [ValueError("a fault"), KeyError("a fault")])
def test_debug_shows_the_traceback(monkeypatch, tmp_path, error):
    done = failing(monkeypatch, tmp_path, "train", error, "--debug")
    assert done.exception is error and not list(tmp_path.iterdir())  # Python prints it.


def test_exit_codes_and_interrupts_are_not_errors(monkeypatch, tmp_path):
    assert failing(monkeypatch, tmp_path, "doctor", click.exceptions.Exit(75)).exit_code == 75
    done = failing(monkeypatch, tmp_path, "doctor", KeyboardInterrupt())
    assert (done.exit_code, done.output.strip()) == (1, "Aborted!") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({}, "a message\n"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "a message\n"),
        ({"RANK": "3", "WORLD_SIZE": "8"}, "[rank 3] a message\n"),
    ],
)
def test_a_message_is_one_line_on_stderr_with_its_rank(monkeypatch, caplog, environment, line):
    log = logging.getLogger("rsa_fast")
    monkeypatch.setattr(main.commands["doctor"], "params", [])
    monkeypatch.setattr(main.commands["doctor"], "callback", lambda: log.info("a message"))
    for _ in range(2):
        done = invoke(main, "doctor", env=environment)
        assert (done.exit_code, done.stdout, done.stderr) == (0, "", line)
    assert caplog.messages == ["a message"] * 2


COMPLETIONS = {
    "tr": {"train"},
    "report --o": {"--out"},
    "train --dataset cifar": {"cifar10", "cifar100"},
    "profile --dataset imagenet100 --backend ": {"auto", *BACKENDS},
    "plan --method sim": {"simsiam", "simsiam-rsa", "simclr"},
    "plan --gpu v": {"v100-16g", "v100-32g"},
    "preview --compare da": {"dali"},
    "export --format t": {"torchvision", "timm", "torch-export"},
    "eval k": {"knn"},
    "em": {"embed"},
    "embed --split pre": {"pretrain"},
    "convert ffcv --max": {"--max-resolution"},
    "neighbours --que": {"--queries"},
    "recipes imagenet100/s": {
        f"imagenet100/{name}" for name in ("simsiam", "simsiam-rsa", "simclr", "supervised", "swav")
    },
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_commands_options_and_names(tmp_path):
    """The bash has loaded what `_RSA_FAST_COMPLETE=bash_source rsa-fast` prints."""
    program = tmp_path / "rsa-fast"
    program.write_text(
        f"#!{sys.executable}\nfrom rsa_fast.cli import main\nmain(prog_name='rsa-fast')\n"
    )
    program.chmod(0o755)
    script = 'eval "$(_RSA_FAST_COMPLETE=bash_source rsa-fast)"\ncomplete -p rsa-fast >&2\n'
    for words in COMPLETIONS:
        count = len(f"rsa-fast {words}".split(" ")) - 1
        empty_word = '""' if words[-1] == " " else ""
        script += f"COMP_WORDS=(rsa-fast {words}{empty_word}); COMP_CWORD={count}; COMPREPLY=()\n"
        script += '_rsa_fast_completion rsa-fast; echo "${COMPREPLY[*]}"\n'
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PATH": path},
    )
    assert "_rsa_fast_completion rsa-fast" in done.stderr
    for (words, completions), line in zip(
        COMPLETIONS.items(), done.stdout.splitlines(), strict=True
    ):
        assert set(line.split()) == completions, words
