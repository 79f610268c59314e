"""What is shipped: the wheel, and what it gives a clean environment, the extras, the image."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.helpers import ROOT, write_folder

tomllib = pytest.importorskip("tomllib", reason="it came with Python 3.11")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
SETUP = (ROOT / "tools" / "setup.sh").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
BUILDER = "77"  # the first setuptools that reads a license as in pyproject.toml
HADOLINT = shutil.which(
    "hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
)


def call(*words: object, **options) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, env=env, **options)
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
            unwanted = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, place / path.name, symlinks=True, ignore=unwanted)
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


def test_the_wheel_holds_one_package_with_all_modules(wheel):
    """The names `pipelines` and `tools` are left to the user."""
    wanted = {
        f"{place}{path.relative_to(ROOT)}"
        for name, place in (("rsa_fast", ""), ("pipelines", "rsa_fast/"), ("tools", "rsa_fast/"))
        for path in (ROOT / name).rglob("*.py")
    }
    wanted.add("rsa_fast/py.typed")  # for type checkers
    names = set(zipfile.ZipFile(wheel).namelist())
    about = f"rsa_fast-{PROJECT['version']}.dist-info"
    assert {name for name in names if not name.startswith(about)} == wanted
    assert f"{about}/licenses/LICENSE" in names


def install(place: Path, *what: object) -> Path:
    """The Python of a new environment with only `what`. A path lends what rsa-fast depends on."""
    call(sys.executable, "-m", "venv", "--without-pip", place)
    python = place / "bin" / "python"
    (site,) = (place / "lib").glob("python*/site-packages")
    (site / "lent.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    call(*pip, "install", *options, *what)
    return python


@pytest.fixture(scope="module", params=["wheel", "editable"])
def python(request: pytest.FixtureRequest, context: Path, tmp_path_factory) -> Path:
    """The Python of an environment in which rsa-fast is installed."""
    place = tmp_path_factory.mktemp(request.param) / "venv"
    if request.param == "wheel":
        return install(place, request.getfixturevalue("wheel"))
    return install(place, "-e", context)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A user's folder whose modules have the names of ours."""
    for name in ("pipelines", "tools"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("OWNER = 'user'\n")
        for module in ("views", "convert", "mine"):
            (tmp_path / name / f"{module}.py").write_text("OWNER = 'user'\n")
    for module in ("rsa_fast", "recipes", "cli"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('the module of the user')\n")
    return tmp_path


def test_a_clean_environment_gets_a_working_command(python, tmp_path):
    command = python.with_name("rsa-fast")
    assert call(command, "--version", cwd=tmp_path) == f"rsa-fast, version {PROJECT['version']}\n"
    assert "Pre-train ResNets" in call(command, "--help", cwd=tmp_path)
    recipe = json.loads(call(command, "recipes", "cifar100/byol", cwd=tmp_path).splitlines()[-1])
    assert (recipe["dataset"], recipe["method"]) == ("cifar100", "byol")


def test_a_converter_is_a_command_of_the_installed_package(python, hostile):
    write_folder(hostile / "photos", {"train": 2})
    call(python.with_name("rsa-fast"), "convert", "ffcv", "photos", "beton", cwd=hostile)
    assert (hostile / "beton" / "train.beton").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("first", ["rsa_fast", "user"])
def test_a_program_imports_its_own_pipelines_and_tools_beside_rsa_fast(python, hostile, first):
    (hostile / "rsa_fast.py").unlink()
    ours = "from rsa_fast import build_recipe, train; from rsa_fast.pipelines.views import VIEWS\n"
    own = "import pipelines.views, pipelines.mine, tools, tools.convert\n"
    owners = "for module in (pipelines, pipelines.views, tools, tools.convert): print(module.OWNER)"
    text = ours + own if first == "rsa_fast" else own + ours
    (hostile / "program.py").write_text(f"{text}build_recipe('cifar10', 'rsa')\n{owners}")
    assert call(python, "program.py", cwd=hostile) == "user\n" * 4
    if first == "user":
        return
    absent = "import rsa_fast.pipelines, importlib.util as u; print(u.find_spec('pipelines'))"
    assert call(python, "-c", absent, cwd=hostile.parent) == "None\n"


@pytest.mark.slow
def test_the_command_and_its_ranks_never_import_from_the_users_folder(python, hostile):
    write_folder(hostile / "photos", {"train": 8}, size=(40, 40))
    words = "train photos --nproc 2 --epochs 1 --batch-size 8 --size 16 --set width=4 --no-eval"
    options = ("--arch", "resnet10", "--backend", "torchvision")  # without a compilation by numba
    call(python.with_name("rsa-fast"), *words.split(), *options, "--out", "run", cwd=hostile)
    assert json.loads((hostile / "run" / "result.json").read_text())["step"] == 1


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
        "docs",
        "dev",
    }
    assert EXTRAS.keys() == wanted
    text = SETUP + "".join(
        path.read_text()
        for name in ("pipelines", "rsa_fast", "tests")
        for path in (ROOT / name).rglob("*.py")
    )
    for names in re.findall(r"(?:rsa-fast|(?:-e|install) '\.)\[([\w,-]+)\]", text):
        assert set(names.split(",")) <= wanted, names


def test_what_the_set_up_installs_is_pinned_and_in_the_declared_ranges():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    pins = {canonicalize_name(name): pin for name, pin in pins.items()}
    installed = {
        name
        for names in re.findall(r"install '\.\[([\w,-]+)\]", SETUP)
        for name in names.split(",")
    }
    assert installed >= {"dali-cu12", "ffcv", "dev"}
    for line in [
        *PROJECT["dependencies"],
        *(line for name in sorted(installed) for line in EXTRAS[name]),
    ]:
        needed = Requirement(line)
        assert needed.specifier.contains(pins[canonicalize_name(needed.name)]), line


def test_the_pythons_of_the_range_are_those_that_were_tried():
    """A row of the table in CONTRIBUTING.md says what was run with a version."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines()
        if re.match(r"\| 3\.\d+ ", line)
    ]
    tried = {python.split()[0]: torch for python, torch, what in rows if what != "not tried"}
    declared = SpecifierSet(PROJECT["requires-python"])
    minors = [f"3.{minor}" for minor in range(8, 20) if declared.contains(f"3.{minor}.1")]
    assert minors == sorted(tried, key=Version)
    lowest = min(Version(torch) for torch in tried.values())
    (needed,) = (Requirement(line) for line in PROJECT["dependencies"] if line.startswith("torch>"))
    assert [Version(each.version) for each in needed.specifier] == [
        Version(f"{lowest.major}.{lowest.minor}")
    ]


def test_the_set_up_and_the_image_take_the_python_of_the_pins():
    """numpy, torch and DALI of constraints.txt are those of this version."""
    assert "PYTHON:-python3.11}" in SETUP
    assert re.search(r"^FROM python:3\.11\.\d+-slim-bookworm$", DOCKERFILE, re.M)
    assert SpecifierSet(PROJECT["requires-python"]).contains("3.11.1")


def test_the_image_installs_the_packages_of_the_set_up_and_runs_it(context):
    (packages,) = re.findall(r"apt-get install -y --no-install-recommends (.*) \\", DOCKERFILE)
    (wanted,) = re.findall(r'^apt_packages="(.*)"$', SETUP, re.M)
    assert set(packages.split()) == {*wanted.split(), "g++", "make"}
    assert "bash tools/setup.sh .venv" in call("make", "--dry-run", "setup", cwd=context)


def test_the_image_is_set_up_by_the_user_who_runs_it_in_the_folder_of_its_command():
    lines = re.findall(r"^(?:RUN|USER|WORKDIR|COPY|ENV|ENTRYPOINT) .*$", DOCKERFILE, re.M)
    before, after = "\n".join(lines).split("\nUSER 1000\n")
    assert "useradd" in DOCKERFILE.partition("USER 1000")[0] and "make setup" not in before
    (folder,) = re.findall(r"^WORKDIR (\S+)$", after, re.M)
    copied, made = after.index("COPY --chown=1000 . ."), after.index("make setup")
    assert copied < made, "the set-up reads what was copied"
    assert f"ENV PATH={folder}/.venv/bin:" in after and 'ENTRYPOINT ["rsa-fast"]' in after


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed: make setup")
def test_the_dockerfile_is_clean_of_lint():
    assert call(HADOLINT, ROOT / "Dockerfile") == ""
