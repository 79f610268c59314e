"""The table of backends. `auto` tries its rows in their order.

A new backend needs a row here and the module that the row names. This module imports nothing heavy,
so that `rsa-fast --help` can list the names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rsa_fast.pipelines.machine import available_memory_bytes

if TYPE_CHECKING:
    import torch

    from rsa_fast.pipelines.loading import Job, Loader
    from rsa_fast.pipelines.sources import Source

RESIDENT_BYTES = 8 * 2**30  # decoded; the small datasets are smaller, ImageNet is larger


@dataclass(frozen=True)
class Backend:
    """`suits` returns why `auto` takes this backend for a source on a device, or an empty string.

    `package` is the optional library that the backend needs, with the name that users know.
    """

    loader: str  # module:class
    suits: Callable[[Source, torch.device], str] = lambda source, device: ""
    package: tuple[str, str] | None = None
    resident: bool = False  # it keeps all images decoded in memory

    def installed(self) -> bool:
        """Whether the needed library is installed. It is searched for, but not imported."""
        parts = self.package[0].split(".") if self.package else []
        # find_spec of a.b raises an error where a is missing.
        return all(find_spec(".".join(parts[: i + 1])) for i in range(len(parts)))

    def open(self, job: Job) -> Loader:
        """The loader of a job. Raises ValueError for a missing library or unsuitable images."""
        module, name = self.loader.split(":")
        loader: Loader = getattr(import_module(module), name)(job)
        return loader


def fits_in_memory(source: Source, device: torch.device) -> str:
    sizes = source.manifest.sizes
    decoded_bytes = 3 * int(sizes.astype("int64").prod(1).sum())
    fits = decoded_bytes <= min(RESIDENT_BYTES, free_bytes(device) // 2)
    if fits and (device.type == "cpu" or (sizes == sizes[0]).all()):
        return f"the images take {decoded_bytes / 2**30:.2f} GiB decoded and stay in memory"
    return ""


def free_bytes(device: torch.device) -> int:
    """The free memory for the images in bytes.

    On a GPU it is the smaller of its own memory and the host memory that this process may use.
    """
    import torch

    free = available_memory_bytes()
    return min(free, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free


def is_beton(source: Source, device: torch.device) -> str:
    return f"{source.beton.name} is a file of FFCV" if source.beton else ""


def decodes_on_gpu(source: Source, device: torch.device) -> str:
    return "it can decode on the GPU" if source.encoded and device.type == "cuda" else ""


def is_fallback(source: Source, device: torch.device) -> str:
    if not source.encoded:
        return "the images are stored as pixels, which need no decoder"
    return "it decodes files fastest on a CPU" if device.type == "cpu" else "it decodes on the CPU"


BACKENDS = {
    "resident": Backend(
        "rsa_fast.pipelines.resident_views:ResidentViews", fits_in_memory, resident=True
    ),
    "ffcv": Backend("rsa_fast.pipelines.ffcv_views:FfcvViews", is_beton, ("ffcv", "FFCV")),
    "dali": Backend(
        "rsa_fast.pipelines.dali_views:DaliViews", decodes_on_gpu, ("nvidia.dali", "DALI")
    ),
    "native": Backend("rsa_fast.pipelines.native_views:NativeViews", is_fallback),
    "torchvision": Backend("rsa_fast.pipelines.torchvision_views:TorchvisionViews"),
}


def choose_backend(source: Source, device: torch.device) -> tuple[str, str]:
    """The name of the backend for a source on a device, and the reason."""
    missing = ""
    for name, backend in BACKENDS.items():
        if reason := backend.suits(source, device):
            if backend.installed():
                return name, missing + reason
            assert backend.package
            missing += f"{backend.package[1]} is not installed; "
    raise AssertionError("native suits every source")
