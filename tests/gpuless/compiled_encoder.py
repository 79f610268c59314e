"""`python compiled_encoder.py FOLDER` compiles a training pass of an encoder on a fake GPU.

Inductor writes kernels for a V100. The program prints how many there are, and the GB that they and
the convolutions read and write, with BatchNorm over one rank and over eight. It also prints the GB
of the same pass operation by operation. There, BatchNorm is assumed to read once what it reads
twice.
"""

from __future__ import annotations

import json
import os

import torch
import torch.distributed as dist
import triton
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.scheduler import FusedSchedulerNode, SchedulerNode

from rsa_fast import networks
from rsa_fast.archs import ResNetLayers
from rsa_fast.insight.planning import Ledger
from rsa_fast.syncbn import convert_batchnorm
from tests.gpuless.lowering import Driver, Unlaunched

IMAGES, SIZE_PX = 64, 224


def train(compiled: bool) -> None:
    """Run a ResNet-50 with one block per stage forward and backward, in fp16 and channels_last."""
    encoder = (
        convert_batchnorm(networks.Encoder("resnet50", compiled=compiled), 1)
        .cuda()
        .to(memory_format=torch.channels_last)
    )
    images = torch.empty(IMAGES, 3, SIZE_PX, SIZE_PX, dtype=torch.float16, device="cuda")
    with torch.autocast("cuda", torch.float16):
        features = encoder(images.to(memory_format=torch.channels_last))
    features.backward(torch.empty_like(features))


def main() -> dict[str, dict]:
    triton.runtime.driver.set_active(Driver())
    triton_helpers.set_driver_to_gpu = lambda: None
    config.compile_threads, config.force_disable_caches = 1, True
    AsyncCompile.triton = lambda *_, **__: Unlaunched()
    networks.RESNETS["resnet50"] = ResNetLayers(True, (1, 1, 1, 1))
    generate, graphs = GraphLowering.codegen, []

    def counted(graph: GraphLowering):
        code = generate(graph)
        nodes = graph.scheduler.nodes
        kernels = sum(isinstance(node, SchedulerNode | FusedSchedulerNode) for node in nodes)
        graphs.append((kernels, sum(node.get_read_write_buffers_sizes() for node in nodes) / 1e9))
        return code

    GraphLowering.codegen = counted
    with Ledger() as ledger:
        train(compiled=False)
    moved = (
        sum(b for where, _, b in ledger.operations if where == part)
        for part in ("online", "backward")
    )
    results = {
        "eager": dict(
            zip(("forward_gb", "backward_gb"), (round(b / 1e9, 4) for b in moved), strict=True)
        )
    }
    train(compiled=True)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=8)
    train(compiled=True)
    for bn in ("local", "sync"):
        for part in ("forward", "backward"):
            kernels, gb = graphs.pop(0)
            results.setdefault(bn, {}).update(
                {f"{part}_kernels": kernels, f"{part}_gb": round(gb, 4)}
            )
    return results


if __name__ == "__main__":
    print(json.dumps(main()), flush=True)
    os._exit(0)
