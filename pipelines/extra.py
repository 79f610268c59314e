"""An augmentation of one's own: a function of a batch's views, named by `views.extra`.

    def erase(views: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]: ...

    rsa-fast train --set views.extra=my_views.py:erase ...

It is called once for each batch, on the device, after all built-in stages and on every backend.
`views` are those of `Batch.views`: `(B, 3, S, S)` each, normalised, in the compute dtype and
channels_last. It returns views of the same names and kind, and may change those that it is given.

All its random numbers must come from `generator`, which is on the device too. Its seed depends only
on (seed, epoch, number of the batch in the epoch, rank), so a resumed run continues bit for bit.
Another number of ranks, or another batch size, gives other random numbers, unlike for the built-in
stages. Evaluation does not call the function.
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
            found = type(self.function).__name__
            raise ValueError(f"views.extra: {spec} is of type {found}, wanted a function")
        self.file = getattr(load_module(spec.rpartition(":")[0]), "__file__", None)
        self.generator = torch.Generator(device)

    @torch.no_grad()
    def __call__(self, views: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """The changed views. Raises ValueError when the function fails, or changes their kind."""
        wanted = {name: kind(view) for name, view in views.items()}
        self.generator.manual_seed(seed)
        try:
            changed = self.function(views, self.generator)
        except Exception as error:
            cause = fault(error, Path(self.file) if self.file else None)
            raise ValueError(f"views.extra: {self.spec} failed: {cause}") from error
        if not isinstance(changed, dict) or changed.keys() != wanted.keys():
            found = list(changed) if isinstance(changed, dict) else type(changed).__name__
            raise ValueError(
                f"views.extra: {self.spec} returned {found}, wanted a dict of {sorted(wanted)}"
            )
        for name, view in changed.items():
            if (found := kind(view)) != wanted[name]:
                raise ValueError(
                    f"views.extra: {self.spec} returned {name} as {found}, wanted {wanted[name]}"
                )
        return {name: changed[name] for name in wanted}


def kind(view: Any) -> str:
    """What a changed view must have in common with the one that was given."""
    if not isinstance(view, Tensor):
        return type(view).__name__
    dtype = str(view.dtype).removeprefix("torch.")
    channels_last = view.is_contiguous(memory_format=torch.channels_last)
    layout = "channels_last" if channels_last else "not channels_last"
    return f"{dtype} {tuple(view.shape)} on {view.device}, {layout}"
