"""Check every operation that torch dispatches for what would be slow or wrong on a GPU.

Only what torch itself accepts is checked here. `torch.cuda.set_sync_debug_mode("error")` refuses
operations that make the host wait, and torch refuses tensors of several devices or types in most
operations.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ATEN = torch.ops.aten
COPIES = {ATEN._to_copy.default, ATEN.copy_.default}
CONVOLUTIONS = {ATEN.convolution.default, ATEN.convolution_backward.default}
PRODUCTS = CONVOLUTIONS | {
    ATEN.mm.default,
    ATEN.addmm.default,
    ATEN.bmm.default,
    ATEN.baddbmm.default,
}
# Operations on lists of tensors do not compare the devices of the lists' elements.
ON_LISTS = ("aten::_foreach", "aten::_amp", "aten::_fused")
PROJECT = f"{Path(__file__).parents[2] / 'rsa_fast'}/"


class GpuLint(TorchDispatchMode):
    """A context that counts operations while it is entered.

    `products` counts matrix products and convolutions by their name and types ("mm float16"), and
    `collectives` counts those of torch.distributed. `faults` counts faults by kind, operation and
    the line of this project that called it. The kinds are

    - pageable-copy: a copy between host and device whose memory on the host is not pinned,
    - convolution-of-wrong-type: a convolution in another type than `dtype`,
    - conv-not-channels_last: a convolution of tensors in another layout,
    - foreach-mixed-device: an operation on lists whose tensors are on several devices.
    """

    def __init__(self, dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.dtype = dtype
        self.faults: Counter[str] = Counter()
        self.products: Counter[str] = Counter()
        self.collectives = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs))
        name = func._schema.name
        self.collectives += name.startswith("c10d::")
        if name.startswith(ON_LISTS) and len({x.device for x in inputs}) > 1:
            self.fault("foreach-mixed-device", func)
        if func in PRODUCTS:
            used = sorted({str(x.dtype).removeprefix("torch.") for x in inputs})
            self.products[f"{name.removeprefix('aten::')} {'/'.join(used)}"] += 1
        if func in CONVOLUTIONS:
            self.check_convolution(func, inputs)
        output = func(*args, **kwargs)
        if func in COPIES:
            self.check_copy(func, inputs + tensors_in(output))
        return output

    def check_convolution(self, func, inputs: list[Tensor]) -> None:
        if any(x.dtype != self.dtype for x in inputs):
            self.fault("convolution-of-wrong-type", func)
        # The fake GPU has a V100's compute capability, 7.0. cuDNN has no bf16 for that, and what
        # torch computes instead is not in channels_last.
        images = [x for x in inputs if x.ndim == 4 and self.dtype != torch.bfloat16]
        if not all(x.is_contiguous(memory_format=torch.channels_last) for x in images):
            self.fault("conv-not-channels_last", func)

    def check_copy(self, func, tensors: list[Tensor]) -> None:
        on_host = [x for x in tensors if not x.is_cuda]
        between = 0 < len(on_host) < len(tensors)
        if between and not all(x.is_pinned() for x in on_host):
            self.fault("pageable-copy", func)

    def fault(self, kind: str, func) -> None:
        calls = [call for call in traceback.extract_stack() if call.filename.startswith(PROJECT)]
        place = f", {Path(calls[-1].filename).name}: {calls[-1].line}" if calls else ""
        self.faults[f"{kind}: {func}{place}"] += 1


def tensors_in(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
