"""What is typed: the Python API of a notebook, and the manners of the command line."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner
from conftest import write_folder

import rsa_fast
from rsa_fast import encoders, engine
from rsa_fast.cli import main


def python(code: str, **env: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | env).stdout


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
    with pytest.raises(AttributeError, match="module 'rsa_fast' has no attribute 'trian'"):
        rsa_fast.trian  # noqa: B018


def test_help_imports_none_of_what_takes_time():
    slow = {"torch", "numpy", "pydantic", "matplotlib", "rich", "numba", "yaml"}
    code = f"import sys, rsa_fast.cli as c; c.main(['--help'], standalone_mode=False); print({slow} & sys.modules.keys())"
    assert python(code).splitlines()[-1] == "set()"


@pytest.mark.parametrize("name", sorted(main.commands))
def test_a_mistyped_command_is_told_the_nearest(name):
    done = CliRunner().invoke(main, [name[:-2] + name[-1] + name[-2]])
    assert done.exit_code == 2 and re.search(f"Did you mean .*'{name}'", done.output)


def test_the_shell_completes_commands_and_options():
    """By what `_RSA_FAST_COMPLETE=bash_source rsa-fast` prints for the shell to load."""
    code = "from rsa_fast.cli import main; main(prog_name='rsa-fast')"
    assert "complete -o nosort -F" in python(code, _RSA_FAST_COMPLETE="bash_source")
    for words, completions in (("rsa-fast tr", ["plain,train"]), ("rsa-fast report --o", ["plain,--out"])):
        asked = {"_RSA_FAST_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        assert python(code, **asked).split() == completions
