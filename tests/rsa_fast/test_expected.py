from __future__ import annotations

import subprocess
import sys

import pytest

from rsa_fast.cli import main
from rsa_fast.datasets import DATASETS
from rsa_fast.expected import GPU_HOURS, GPUS, REPORTED, expectations
from rsa_fast.methods import METHODS
from rsa_fast.recipes import build_recipe
from rsa_fast.tools.gpu_hours import gpu_hours
from tests.helpers import invoke

# The epochs of the published runs: PAPER 4.1, and Table 4 for ImageNet-1K.
EPOCHS = dict.fromkeys(DATASETS, 200) | {"imagenet1k-100ep": 100}


def test_every_recipe_of_a_published_dataset_has_a_row():
    assert DATASETS.keys() - {"auto", "demo"} == GPUS.keys() == REPORTED.keys()
    assert list(GPU_HOURS) == list(METHODS)
    assert {len(hours) for hours in GPU_HOURS.values()} == {len(GPUS)}
    assert len(expectations()) == len(GPUS) * len(METHODS)


def test_a_published_accuracy_belongs_to_a_run_as_long_as_the_recipe_s():
    for row in expectations():
        if row.top1 is not None:
            recipe = build_recipe(row.dataset, row.method)
            epochs = 100 if row.method == "supervised" else EPOCHS[row.dataset]
            assert recipe.epochs == epochs, row


@pytest.mark.parametrize(
    "name",
    [
        "stl10/supervised",
        pytest.param("cifar10/rsa", marks=pytest.mark.slow),
        pytest.param("cifar100/inst-dis", marks=pytest.mark.slow),
        pytest.param("imagenet1k-100ep/swav", marks=pytest.mark.slow),
    ],
)
def test_the_gpu_hours_are_those_of_the_plan(name):
    (row,) = [row for row in expectations() if row.name == name]
    assert gpu_hours(row) == row.gpu_hours


def test_a_row_s_command_starts_its_recipe(folder, tmp_path):
    for row in expectations()[:: len(METHODS) + 1]:
        _, *words = row.command.replace("DATA", str(folder)).split()
        words += ["--dry-run", "--out", str(tmp_path), "--batch-size", "32"]
        done = invoke(main, *words)
        assert done.exit_code == 0, done.output
        assert row.method in done.output and row.dataset in done.output


def test_the_list_comes_without_torch():
    code = "import sys; from rsa_fast.cli import main; main(['recipes'], standalone_mode=False);"
    code += "print({'torch', 'numpy', 'pydantic'} & sys.modules.keys())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.splitlines()[-1] == "set()"
