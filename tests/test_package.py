"""What is shipped: the wheel, and what it gives a clean environment, the extras, the image."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
SETUP = (ROOT / "tools" / "setup.sh").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
BUILDER = "77"  # the first setuptools that reads a license as in pyproject.toml
HADOLINT = shutil.which(
    "hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
)


def call(*words: object, **options) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that .dockerignore lets into the image."""
    everything, *kept, compiled = re.findall(
        r"^[^#\n].*$", (ROOT / ".dockerignore").read_text(), re.M
    )
    assert (everything, compiled) == ("*", "**/__pycache__") and all(
        name.startswith("!") for name in kept
    )
    place = tmp_path_factory.mktemp("context")
    for path in (ROOT / name[1:] for name in kept):
        if path.is_dir():
            shutil.copytree(path, place / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, place)
    return place


@pytest.fixture(scope="module")
def wheel(context: Path) -> Path:
    if Version(version("setuptools")) < Version(BUILDER):
        pytest.skip(f"needs setuptools {BUILDER}: make setup")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    call(
        *pip,
        "wheel",
        context,
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        context / "dist",
    )
    (built,) = (context / "dist").iterdir()
    return built


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel):
    wanted = {
        str(path.relative_to(ROOT))
        for name in ("pipelines", "rsa_fast", "tools")
        for path in (ROOT / name).rglob("*.py")
    }
    wanted |= {"pipelines/py.typed", "rsa_fast/py.typed"}  # for type checkers
    names = set(zipfile.ZipFile(wheel).namelist())
    about = f"rsa_fast-{PROJECT['version']}.dist-info"
    assert {name for name in names if not name.startswith(about)} == wanted
    assert f"{about}/licenses/LICENSE" in names


def test_a_clean_environment_gets_a_working_command(wheel, tmp_path, monkeypatch):
    """The environment contains only the wheel. A path lends the packages that it depends on."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    call(*pip, "install", "--no-deps", "--no-index", wheel)
    place = Path(
        call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    (place / "lent.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    command = python.with_name("rsa-fast")
    assert call(python, "-c", "import rsa_fast; print(rsa_fast.__file__)", cwd=tmp_path).startswith(
        str(place)
    )
    assert call(command, "--version", cwd=tmp_path) == f"rsa-fast, version {PROJECT['version']}\n"
    assert "Pre-train ResNets" in call(command, "--help", cwd=tmp_path)
    recipe = json.loads(call(command, "recipes", "cifar100/byol", cwd=tmp_path).splitlines()[-1])
    assert (recipe["dataset"], recipe["method"]) == ("cifar100", "byol")
    assert "--fix" in call(python, "-m", "tools.verify", "--help", cwd=tmp_path)


def test_the_extras_are_those_that_the_code_and_the_set_up_name():
    wanted = {
        "dali-cu12",
        "dali-cu13",
        "ffcv",
        "tensorboard",
        "wandb",
        "detection",
        "embed",
        "export",
        "timm",
        "dev",
    }
    assert EXTRAS.keys() == wanted
    text = SETUP + "".join(
        path.read_text()
        for name in ("pipelines", "rsa_fast", "tests")
        for path in (ROOT / name).rglob("*.py")
    )
    for names in re.findall(r"(?:rsa-fast|-e '\.)\[([\w,-]+)\]", text):
        assert set(names.split(",")) <= wanted, names


def test_what_the_set_up_installs_is_pinned_and_in_the_declared_ranges():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    pins = {canonicalize_name(name): pin for name, pin in pins.items()}
    installed = {
        name for names in re.findall(r"-e '\.\[([\w,-]+)\]", SETUP) for name in names.split(",")
    }
    assert installed >= {"dali-cu12", "ffcv", "dev"}
    for line in [
        *PROJECT["dependencies"],
        *(line for name in sorted(installed) for line in EXTRAS[name]),
    ]:
        needed = Requirement(line)
        assert needed.specifier.contains(pins[canonicalize_name(needed.name)]), line


def test_one_python_is_declared_set_up_and_in_the_image():
    declared = SpecifierSet(PROJECT["requires-python"])
    assert [minor for minor in range(8, 16) if declared.contains(f"3.{minor}.1")] == [11]
    assert "PYTHON:-python3.11}" in SETUP and re.search(
        r"^FROM python:3\.11\.\d+-slim-bookworm$", DOCKERFILE, re.M
    )


def test_the_image_installs_the_packages_of_the_set_up_and_runs_it(context):
    (packages,) = re.findall(r"apt-get install -y --no-install-recommends (.*) \\", DOCKERFILE)
    (wanted,) = re.findall(r'^apt_packages="(.*)"$', SETUP, re.M)
    assert set(packages.split()) == {*wanted.split(), "g++", "make"}
    steps = [line.split(" ", 1)[0] for line in re.findall(r"^[A-Z]+ .*$", DOCKERFILE, re.M)]
    assert steps == ["FROM", "RUN", "USER", "WORKDIR", "COPY", "RUN", "ENV", "ENTRYPOINT", "CMD"]
    assert (
        re.search(r"^RUN --mount=\S+ make setup && ", DOCKERFILE, re.M)
        and "USER 1000" in DOCKERFILE
    )
    assert "bash tools/setup.sh .venv" in call("make", "--dry-run", "setup", cwd=context)


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed: make setup")
def test_the_dockerfile_is_clean_of_lint():
    assert call(HADOLINT, ROOT / "Dockerfile") == ""
