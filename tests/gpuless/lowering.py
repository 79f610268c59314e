"""`python lowering.py FOLDER` compiles the tensor operations of a view on a fake GPU.

Inductor compiles them to machine code for a V100 and an H100. The program prints, by function, the
number of kernels, and the most registers and spilled bytes of any kernel.

Inductor's launcher of kernels is replaced, so nothing runs. FOLDER is for compiled files.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_helpers
from triton.backends.compiler import GPUTarget

from rsa_fast.pipelines import device_ops

FOLDER = Path(sys.argv[1])
os.environ |= {
    "TORCHINDUCTOR_CACHE_DIR": str(FOLDER / "inductor"),
    "TRITON_CACHE_DIR": str(FOLDER / "triton"),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
IMAGES, SIZE_PX = 256, 224
V100, H100 = 70, 90


class Driver:
    """The driver of the fake GPU, which is a V100. It loads nothing."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", V100, 32)

    def get_current_device(self) -> int:
        return 0


class Unlaunched:
    def run(self, *_: object, **__: object) -> None: ...


def sources(function: Callable, *inputs: torch.Tensor) -> dict[str, str]:
    """Return, by name, the Triton kernels that Inductor writes for a function of these inputs."""
    found: dict[str, str] = {}
    AsyncCompile.triton = lambda _, name, source, **__: found.update({name: source}) or Unlaunched()
    torch.compile(function, fullgraph=True, dynamic=False)(*inputs)
    return found


def usage(name: str, source: str, capability: int) -> tuple[int, int]:
    """Return the most registers and spilled bytes of a kernel.

    The maximum is over the configurations that Inductor would choose from.
    """
    kernel = getattr(PyCodeCache.load(source.replace(f"cc={V100}", f"cc={capability}")), name)
    kernel.precompile(warm_cache_only=True)
    most = [0, 0]
    for compiled in kernel.compile_results:
        (cubin := FOLDER / "kernel.cubin").write_bytes(compiled.kernel.asm["cubin"])
        listed = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
        registers, stack, local = (
            int(re.search(rf"{part}:(\d+)", listed)[1]) for part in ("REG", "STACK", "LOCAL")
        )
        most = [max(most[0], registers), max(most[1], stack + local)]
    return most[0], most[1]


def blends(levels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    for slot in range(5):
        device_ops.blend_(levels, *weights[slot])
    return levels


def crop_weights(start: torch.Tensor, length: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    return device_ops.filter_weights(start, length, 500, SIZE_PX, flip, bicubic=False)


def main() -> dict[str, dict]:
    triton.runtime.driver.set_active(Driver())
    triton_helpers.set_driver_to_gpu = lambda: None
    config.compile_threads, config.use_static_cuda_launcher = 1, False

    def on_gpu(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="cuda")

    levels = on_gpu(IMAGES, 3, SIZE_PX, SIZE_PX)
    work = {
        "triangle_weights": (crop_weights, *(on_gpu(IMAGES) for _ in range(3))),
        "blend_": (blends, levels, on_gpu(5, 3, IMAGES, 1, 1, 1)),
        "shift_hue": (device_ops.shift_hue, levels, on_gpu(IMAGES, 1, 1)),
    }
    results = {}
    for name, (function, *inputs) in work.items():
        kernels = sources(function, *inputs)
        results[name] = {"kernels": len(kernels)}
        for capability in (V100, H100):
            registers, spilled = zip(
                *(usage(*kernel, capability) for kernel in kernels.items()), strict=True
            )
            results[name] |= {
                f"sm_{capability}_registers": max(registers),
                f"sm_{capability}_spilled_bytes": max(spilled),
            }
    unfused = sources(lambda x: device_ops.round_level(x.cumsum(1).sort()[0]), on_gpu(8, 5000))
    compiled = triton.compile
    triton.compile = lambda source, options, **rest: compiled(
        source, options=options | {"maxnreg": 24}, **rest
    )
    name, source = next(iter(kernels.items()))
    spilling = usage(name, source + "# again", V100)  # The same text would be loaded only once.
    results["planted"] = {
        "kernels": len(unfused),
        "registers": spilling[0],
        "spilled_bytes": spilling[1],
    }
    return results


if __name__ == "__main__":
    print(json.dumps(main()), flush=True)
    os._exit(0)
