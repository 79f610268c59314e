"""DALI for a fake GPU: the real CPU graph, with its outputs in memory of the fake device.

DALI is linked to a CUDA runtime of its own, so the fake one does not reach it. What our code calls
are therefore objects made by `create_autospec` from DALI's own classes: a call that DALI does not
have, or a wrong keyword, is a TypeError here too. The GPU graph is still built and serialised,
which checks each of its operators and arguments.

The device is assumed to be slow. A copy out of DALI's memory, and DALI's reuse of that memory after
its release, are queued in the order in which a GPU would execute them. `finish_work` runs them.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import torch
from nvidia.dali import Pipeline
from nvidia.dali.tensors import TensorGPU, TensorListGPU

from rsa_fast.pipelines import dali_views

REUSED = 0xA5  # Memory that was given back to DALI is overwritten with this level.

work: deque[Callable[[], object]] = deque()  # what the device still has to do
waits = 0  # how often the host waited for the device
pipelines = 0  # how many were built


def finish_work() -> None:
    while work:
        work.popleft()()


def install() -> None:
    """Make `dali_views` build its GPU pipelines here."""
    real = dali_views.build_graph

    def build_graph(job: Any, device: str, device_id: int | None) -> Pipeline:
        if device == "cpu":
            return real(job, "cpu", None)
        assert device_id == torch.cuda.current_device()
        real(job, "gpu", None).serialize()
        return on_fake_gpu(real(job, "cpu", None))

    dali_views.build_graph = build_graph


def on_fake_gpu(cpu: Pipeline) -> Pipeline:
    """Return a GPU pipeline as our code sees it; `cpu` does its work."""
    global pipelines
    pipelines += 1
    pipe = create_autospec(Pipeline, instance=True, spec_set=True)
    lent: deque[list[torch.Tensor]] = deque()  # device memory of outputs that were not released yet

    def share_outputs(cuda_stream: Any = None) -> list[TensorListGPU]:
        global waits
        waits += cuda_stream is None
        outputs = cpu.share_outputs()
        lent.append([on_device(np.asarray(output.as_tensor())) for output in outputs])
        return [tensor_list(memory, cuda_stream) for memory in lent[-1]]

    def release_outputs() -> None:
        cpu.release_outputs()
        for memory in lent.popleft():
            work.append(
                lambda memory=memory: ctypes.memset(memory.data_ptr(), REUSED, memory.nbytes)
            )

    pipe.build.side_effect = cpu.build
    pipe.feed_input.side_effect = cpu.feed_input
    pipe.schedule_run.side_effect = cpu.schedule_run
    pipe.share_outputs.side_effect = share_outputs
    pipe.release_outputs.side_effect = release_outputs
    pipe._shutdown.side_effect = cpu._shutdown
    return pipe


def on_device(pixels: np.ndarray) -> torch.Tensor:
    """Return memory of the fake device with these values."""
    memory = torch.empty(pixels.shape, dtype=torch.uint8, device="cuda")
    ctypes.memmove(memory.data_ptr(), np.ascontiguousarray(pixels).ctypes.data, pixels.nbytes)
    return memory


def tensor_list(memory: torch.Tensor, bound_to: torch.cuda.Stream | None) -> TensorListGPU:
    """Return an output of a pipeline that is in `memory`."""
    from nvidia.dali.types import DALIDataType

    tensor = create_autospec(TensorGPU, instance=True, dtype=DALIDataType.UINT8)
    tensor.shape.return_value = list(memory.shape)

    def copy_to_external(
        ptr: ctypes.c_void_p,
        cuda_stream: ctypes.c_void_p | None = None,
        non_blocking: bool = False,
        use_copy_kernel: bool = False,
    ) -> None:
        global waits
        waits += not non_blocking
        assert bound_to is None or cuda_stream.value == bound_to.cuda_stream
        work.append(lambda: ctypes.memmove(ptr.value, memory.data_ptr(), memory.nbytes))

    tensor.copy_to_external.side_effect = copy_to_external
    outputs = create_autospec(TensorListGPU, instance=True)
    outputs.as_tensor.return_value = tensor
    return outputs
