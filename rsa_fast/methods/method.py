"""What every method is, and what those with a target network share."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipelines.views import Batch
from rsa_fast import schedules
from rsa_fast.distributed import gather, rank, world_size
from rsa_fast.methods import method_class
from rsa_fast.networks import Encoder, Projected
from rsa_fast.recipes import Plan, Recipe
from rsa_fast.sourced import Rows, cite
from rsa_fast.syncbn import bn_groups, convert_batchnorm

PAIRS = {"AA": ("aggressive_1", "aggressive_2"), "AW": ("aggressive_1", "weak_2")}
BETA = {"all": cite("PAPER 4.1", beta_base=0.4), "32px": cite("PAPER 4.1", beta_base=0.3)}
QUEUE_START = cite("MoCo builder.py, ReSSL backbone.py", zero_init_residual=False) | cite(
    "MoCo v2", tau_schedule="fixed"
)
Now = Mapping[str, float]  # what changes with the step, by name: lr, and the recipe's own


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

    `recipe_type` has its fields, and `rows` its numbers for each scale of dataset. `encoder` is the
    network that is trained for later use. `forward` returns one step's loss on this rank's batch.
    """

    recipe_type: ClassVar[type[Recipe]]
    rows: ClassVar[Rows]
    reads: frozenset[str]
    encoder: Encoder

    def __init__(self, recipe: Recipe, encoder: Encoder) -> None:
        super().__init__()
        self.recipe = recipe
        # nn.Module would register the encoder here, and a state dict would contain it twice: the
        # network of a subclass that contains the encoder registers it.
        object.__setattr__(self, "encoder", encoder)

    def forward(self, batch: Batch, now: Now) -> Loss:
        """One step's loss; `now` has the values of the recipe's `schedule` at this step."""
        raise NotImplementedError

    def after_step(self, now: Now) -> None:
        """Called after every optimiser step with the values of the next step."""

    def constant_lr_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters that keep the peak learning rate throughout."""
        return ()


class TargetRecipe(Recipe):
    """Of methods with a target network."""

    tau_base: float = Field(0.99, ge=0, le=1)  # the target's momentum at the start
    tau_schedule: Literal["cosine", "fixed"] = "cosine"  # cosine: ends at 1

    def schedule(self, step: int, plan: Plan) -> dict[str, float]:
        tau = schedules.tau(step + 1, plan.total_steps, self.tau_base, self.tau_schedule)
        return super().schedule(step, plan) | {"tau": tau}


class BetaRecipe(Recipe):
    """Of RSA's methods."""

    beta_base: float = Field(ge=0, le=1)  # the weight of aggressive pairs at the start
    beta_schedule: Literal["cosine", "fixed"] = (
        "cosine"  # cosine: ends at 0; fixed: PAPER Table 1's ablation
    )

    def schedule(self, step: int, plan: Plan) -> dict[str, float]:
        beta = schedules.beta(step + 1, plan.total_steps, self.beta_base, self.beta_schedule)
        return super().schedule(step, plan) | {"beta": beta}


class TargetMethod(Method):
    """Has an online network that learns and a target network that follows it without gradient."""

    def __init__(self, recipe: Recipe, online: Projected) -> None:
        super().__init__(recipe, online.encoder)
        self.online = online
        # A copy of the weights. Its BatchNorm runs in train mode on batch statistics, as in the reference code, so its
        # running statistics drift on their own and are never read.
        self.target = copy.deepcopy(online).requires_grad_(False)

    @torch.no_grad()
    def after_step(self, now: Now) -> None:
        """target = tau target + (1 - now["tau"]) online, for the weights; BatchNorm buffers are left alone.

        Called after the optimiser step with the tau of the next step, which gives every forward the same target as the
        reference codes (RSA, MoCo, ReSSL), where the move comes in the forward before the target is used.
        """
        torch._foreach_lerp_(
            list(self.target.parameters()), list(self.online.parameters()), 1 - now["tau"]
        )


class QueueRecipe(TargetRecipe):
    """Of methods that compare with a queue of past embeddings."""

    out_dim: int = Field(ge=1)
    queue_size: int = Field(ge=1)
    temperature: float = Field(gt=0)

    @model_validator(mode="after")
    def queue_holds_a_step(self) -> QueueRecipe:
        if self.queue_size < 2 * self.batch_size:
            raise ValueError(
                f"queue_size = {self.queue_size} is less than the two views of {self.batch_size} images"
            )
        return self


class QueueMethod(TargetMethod):
    """A target network whose past outputs are kept in a queue, `(out_dim, queue_size)`, starting as noise of unit length.

    `bn_groups` is how many parts of the global batch BatchNorm normalises apart: the target's batch is then shuffled, so
    that its parts do not hold the same images as the online network's and statistics give no pair away (ShuffleBN).
    """

    queue: Tensor
    pointer: Tensor

    def __init__(self, recipe: QueueRecipe, encoder: Encoder, hidden_dim: int) -> None:
        head = mlp_without_bn(encoder.feature_dim, hidden_dim, recipe.out_dim)
        super().__init__(recipe, Projected(encoder, head))
        self.temperature, self.bn_groups = recipe.temperature, bn_groups(recipe.bn)
        noise = torch.randn(recipe.out_dim, recipe.queue_size)
        self.register_buffer("queue", F.normalize(noise, dim=0))
        self.register_buffer(
            "pointer", torch.zeros((), dtype=torch.int64)
        )  # the next column to replace

    @torch.no_grad()
    def keys(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Unit-length target outputs, without gradient: this rank's `(b, out_dim)` and those of all ranks, in order."""
        if self.bn_groups == 1:
            every = gather(unit(self.target(images)))
        else:
            pooled = gather(
                images.permute(0, 2, 3, 1)
            )  # channels_last as it lies: gather wants it contiguous
            order = shuffle(len(pooled), self.bn_groups, images.device)
            dealt = pooled[order.chunk(world_size())[rank()]].permute(0, 3, 1, 2)
            shuffled = gather(unit(self.target(dealt)))
            every = torch.empty_like(shuffled).index_copy_(0, order, shuffled)
        return every[rank() * len(images) :][: len(images)], every

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """The oldest columns make room for `keys` `(n, out_dim)`; the pointer stays on the device."""
        size = self.queue.shape[1]
        columns = (self.pointer + torch.arange(len(keys), device=keys.device)) % size
        self.queue.index_copy_(1, columns, keys.T.to(self.queue.dtype))
        self.pointer.add_(len(keys)).remainder_(size)


def shuffle(count: int, groups: int, device: torch.device) -> Tensor:
    """A permutation of `count` images that deals each of `groups` consecutive parts out over all parts.

    Which images share a batch is drawn anew every epoch, so that a fixed deal is as random as a drawn one, and needs no
    generator to be kept in step across ranks or saved.
    """
    return torch.arange(count, device=device).view(groups, -1).T.flatten()


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
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, out_dim)
    )


def unit(x: Tensor) -> Tensor:
    """Rows of unit length, in float32 at least."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


def build_method(recipe: Recipe) -> Method:
    """The freshly initialised method of a recipe, channels_last, on the CPU; seed torch before.

    Raises ValueError when the recipe's `bn` does not suit the number of ranks.
    """
    groups = bn_groups(recipe.bn)
    encoder = Encoder(
        recipe.arch,
        recipe.stem,
        recipe.width,
        zero_init_residual=recipe.zero_init_residual,
        recompute_stages=recipe.recompute_stages,
        compiled=recipe.compile,
    )
    method = convert_batchnorm(method_class(recipe.method)(recipe, encoder), groups)
    method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
    return method
