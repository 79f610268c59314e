"""The user's own augmentation: a function that changes a batch's views, set by `views.extra`.

    def erase(views: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]: ...

    rsa-fast train --set views.extra=my_views.py:erase ...

The function is called once for each batch, on the device, after all built-in stages and on every
backend. `views` are those of `Batch.views`: `(B, 3, S, S)` each, normalised, in the compute dtype
and channels_last. The function must return views of the same names, shapes, dtype and memory
format on the same device. It may change its input.

All its random numbers must come from `generator`, which is on the device too. Its seed depends only
on (seed, epoch, number of the batch in the epoch, rank), so a resumed run continues bit-exactly.
Unlike in the built-in stages, another number of ranks or another batch size gives other random
numbers. Evaluation does not call the function.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsa_fast.pipelines.named import fault, load_module, load_object


class Extra:
    """The function that `spec` names, and a generator for it on `device`.

    Raises ValueError when there is no such function.
    """

    def __init__(self, spec: str, device: torch.device) -> None:
        self.spec = spec
        self.function = load_object(spec)
        if not callable(self.function):
            type_name = type(self.function).__name__
            raise ValueError(f"views.extra: {spec} is of type {type_name}, wanted a function")
        self.file = getattr(load_module(spec.rpartition(":")[0]), "__file__", None)
        self.generator = torch.Generator(device)

    @torch.no_grad()
    def __call__(self, views: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """The changed views. Raises ValueError if the function fails or changes their `kind`."""
        wanted = {name: kind(view) for name, view in views.items()}
        self.generator.manual_seed(seed)
        try:
            changed = self.function(views, self.generator)
        except Exception as error:
            cause = fault(error, Path(self.file) if self.file else None)
            raise ValueError(f"views.extra: {self.spec} failed: {cause}") from error
        if not isinstance(changed, dict) or changed.keys() != wanted.keys():
            returned = list(changed) if isinstance(changed, dict) else type(changed).__name__
            raise ValueError(
                f"views.extra: {self.spec} returned {returned}, wanted a dict of {sorted(wanted)}"
            )
        for name, view in changed.items():
            if (actual := kind(view)) != wanted[name]:
                raise ValueError(
                    f"views.extra: {self.spec} returned {name} as {actual}, wanted {wanted[name]}"
                )
        return {name: changed[name] for name in wanted}


def kind(view: Any) -> str:
    """The properties that a changed view must have in common with the original, in words."""
    if not isinstance(view, Tensor):
        return type(view).__name__
    dtype = str(view.dtype).removeprefix("torch.")
    channels_last = view.is_contiguous(memory_format=torch.channels_last)
    layout = "channels_last" if channels_last else "not channels_last"
    return f"{dtype} {tuple(view.shape)} on {view.device}, {layout}"
