"""The files by which others join the project agree with it."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from importlib.metadata import version

import pytest
import yaml

import rsa_fast
from tests.helpers import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_short_says_that_it_was_not_run_and_has_one_command(path):
    text = path.read_text()
    assert text.startswith("# Not run yet") and len(text.splitlines()) <= 13
    (job,) = yaml.safe_load(text)["jobs"].values()
    (command,) = (step["run"] for step in job["steps"] if "run" in step)
    assert (
        command
        == {
            "lint": "make lint",
            "tests": "make test test-slow",
            "docs": "make docs",
            "versions": "bash tools/try_versions.sh python newest",
        }[path.stem]
    )
    program, *words = command.split()
    assert set(words) <= TARGETS if program == "make" else (ROOT / words[0]).is_file()


def test_the_hooks_run_what_make_lint_runs():
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    linters = {
        line.strip().removeprefix("$(BIN)/").removesuffix(" .") for line in recipe.split("\n")
    }
    hooks = [
        hook
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
    ]
    entries = {hook.get("entry", "").removeprefix(".venv/bin/") for hook in hooks}
    assert linters - {""} <= entries
    assert {"codespell", "links"} <= {hook["id"] for hook in hooks}


def test_tests_import_each_other_s_helpers_by_full_names_and_no_test():
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert all(file.with_name("__init__.py") in files for file in files)
    local = {part for file in files for part in file.relative_to(ROOT).with_suffix("").parts}
    local -= {"tests", "pipelines", "rsa_fast", "tools"}  # These are packages at the top too.
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                first, *rest = name.split(".")
                assert first not in local, f"{file}: {name}"
                tests = [part for part in rest if part == "conftest" or part.startswith("test_")]
                assert first != "tests" or not tests, f"{file}: {name}"


def test_the_version_is_one_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == rsa_fast.__version__ == version("rsa-fast")
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_public_modules_exist():
    listed = rsa_fast.__doc__.partition("The public interface")[2]
    names = re.findall(r"`(rsa_fast\.[\w.]+)`", listed)
    assert len(names) == 7
    for name in names:
        try:
            import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            assert hasattr(import_module(module), attribute), name
