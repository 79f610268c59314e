"""What every method is, and what those with a target network share."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.views import Batch
from rsa_fast.networks import Encoder, Projected


@dataclass
class Loss:
    """What a forward returns, all on the device: the scalar to minimise, one view's embeddings `(B, D)` of unit length (the
    engine watches them for collapse), and named scalars for the log."""

    total: Tensor
    embeddings: Tensor
    parts: dict[str, Tensor]

    def __post_init__(self) -> None:
        self.embeddings = self.embeddings.detach()
        self.parts = {name: part.detach() for name, part in self.parts.items()}


class Method(nn.Module):
    """`reads` names the views that the method computes with; no other view is made.

    `encoder` is the network that is trained for later use. `forward` returns one step's loss on
    this rank's batch.
    """

    reads: frozenset[str]
    encoder: Encoder

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        # nn.Module would register the encoder here, and a state dict would contain it twice: the
        # network of a subclass that contains the encoder registers it.
        object.__setattr__(self, "encoder", encoder)

    def forward(self, batch: Batch, beta: float) -> Loss:
        raise NotImplementedError

    def after_step(self, tau: float) -> None:
        """Called after every optimiser step with the tau of the next step."""

    def constant_lr_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters that keep the peak learning rate throughout."""
        return ()


class TargetMethod(Method):
    """Has an online network that learns and a target network that follows it without gradient."""

    def __init__(self, online: Projected) -> None:
        super().__init__(online.encoder)
        self.online = online
        # A copy of the weights. Its BatchNorm runs in train mode on batch statistics, as in the reference code, so its
        # running statistics drift on their own and are never read.
        self.target = copy.deepcopy(online).requires_grad_(False)

    @torch.no_grad()
    def after_step(self, tau: float) -> None:
        """target = tau target + (1 - tau) online, for the weights; BatchNorm buffers are left alone.

        Called after the optimiser step with the tau of the next step, which gives every forward the same target as the
        reference codes (RSA, MoCo, ReSSL), where the move comes in the forward before the target is used.
        """
        torch._foreach_lerp_(list(self.target.parameters()), list(self.online.parameters()), 1 - tau)


def mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """BYOL's head: linear, BatchNorm, ReLU, linear without bias and without BatchNorm at the output."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, out_dim, bias=False),
    )


def mlp_without_bn(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """MoCo v2's and ReSSL's head: linear, ReLU, linear."""
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, out_dim))


def unit(x: Tensor) -> Tensor:
    """Rows of unit length, in float32 at least."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)
