"""The installed wheels contain machine code for a V100 (sm_70) and an H100 (sm_90).

Later wheels have dropped sm_70.
"""

from __future__ import annotations

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT

WANTED = {"sm_70", "sm_90"}
PINS = (ROOT / "constraints.txt").read_text().split()

pytestmark = pytest.mark.skipif(
    f"torch=={torch.__version__.partition('+')[0]}" not in PINS,
    reason=f"torch {torch.__version__} is not the one of constraints.txt",
)


def test_torch_is_compiled_for_them():
    if not torch.version.cuda:
        pytest.skip("this torch is without CUDA")
    assert set(torch._C._cuda_getArchFlags().split()) >= WANTED


@pytest.mark.parametrize(
    ("package", "pattern"),
    [
        ("torchvision", "_C*.so"),
        pytest.param(
            "nvidia.cudnn", "lib/libcudnn_engines_precompiled.so.*", marks=pytest.mark.slow
        ),
        ("nvidia.nccl", "lib/libnccl.so.*"),
        ("nvidia.nvjpeg", "lib/libnvjpeg.so.*"),
        ("nvidia.dali", "libdali_kernels.so"),
    ],
)
def test_so_are_the_libraries_beside_it(package, pattern):
    tool = (
        Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if find_spec("triton")
        else None
    )
    if tool is None or not tool.is_file():
        pytest.skip("no cuobjdump: it comes with triton")
    # The second look-up raises if the first package is missing.
    if not find_spec(package.partition(".")[0]) or not (found := find_spec(package)):
        pytest.skip(f"{package} is not installed")
    (library,) = (
        path for place in found.submodule_search_locations for path in Path(place).glob(pattern)
    )
    tool = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listed = subprocess.run(
        [tool, "--list-elf", library], capture_output=True, text=True, check=True
    ).stdout
    assert set(re.findall(r"\bsm_\d+\b", listed)) >= WANTED
