"""The base class of all methods, and what methods with a target network or a queue share.

In shapes, B is the number of images on this rank, N that on all ranks together (N = B with one
process), D is `out_dim` and K is `queue_size`.
"""

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
from rsa_fast.networks import Encoder, Projected, build_encoder
from rsa_fast.recipes import Derived, Recipe
from rsa_fast.sourced import Rows, cite
from rsa_fast.syncbn import bn_groups, convert_batchnorm

PAIRS = {"AA": ("aggressive_1", "aggressive_2"), "AW": ("aggressive_1", "weak_2")}
BETA_ROWS = {"all": cite("PAPER 4.1", beta_base=0.4), "32px": cite("PAPER 4.1", beta_base=0.3)}
QUEUE_FIELDS = {
    **cite("MoCo builder.py, ReSSL backbone.py", zero_init_residual=False),
    **cite("MoCo v2", tau_schedule="fixed"),
}
# Parts of 32 images on 1, 2, 4 or 8 GPUs. One part on one GPU leaves ShuffleBN nothing to shuffle.
EIGHT_GPUS = cite(
    "MoCo, ReSSL ressl.py: 256 images on 8 GPUs; on ImageNet-100, split:4 restores the 4 GPUs of "
    "PAPER Table 7 with 64 images each",
    bn="split:8",
)
# The values of a recipe's schedule at one step, by name: "lr" and, if the method has them, "tau"
# and "beta".
Now = Mapping[str, float]


@dataclass
class Loss:
    """What `forward` returns, all on the device. `embeddings` and `parts` carry no gradient."""

    total: Tensor  # the scalar to minimise
    embeddings: Tensor  # (B, D), unit rows of one view; the engine watches them for collapse
    parts: dict[str, Tensor]  # named scalars for the log

    def __post_init__(self) -> None:
        self.embeddings = self.embeddings.detach()
        self.parts = {name: part.detach() for name, part in self.parts.items()}


class Method(nn.Module):
    """The base class: a subclass sets the class attributes, builds its networks and has `forward`.

    `recipe_type` is the class of its recipes, and `rows` contains its numbers for each scale of
    dataset. `reads` names the views that `forward` uses; the loader makes no others. `encoder` is
    the network that is trained for later use. `mean_over_images` says that the loss is a mean of
    what each image alone contributes, but for BatchNorm: its gradient may then be accumulated over
    parts of a batch.

    A method is built from its recipe and an encoder. It copies what it needs from the recipe.
    """

    recipe_type: ClassVar[type[Recipe]]
    rows: ClassVar[Rows]
    reads: frozenset[str]
    mean_over_images: ClassVar[bool] = False
    encoder: Encoder

    def __init__(self, recipe: Recipe, encoder: Encoder) -> None:
        super().__init__()
        # nn.Module would register the encoder here, and a state dict would contain it twice: the
        # network of a subclass that contains the encoder registers it.
        object.__setattr__(self, "encoder", encoder)

    def forward(self, batch: Batch, now: Now) -> Loss:
        """The loss of one step on this rank's batch.

        `now` contains the values of the recipe's `schedule` at this step.
        """
        raise NotImplementedError

    def after_step(self, now: Now) -> None:
        """Called after every optimiser step, with the schedule's values at the next step."""

    def constant_lr_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters whose learning rate stays at its peak throughout."""
        return ()


class TargetRecipe(Recipe):
    """The fields of methods with a target network."""

    # The target's weight in its moving average at the start (PAPER 4.1), from 0 to 1.
    tau_base: float = Field(0.99, ge=0, le=1)
    # cosine: tau rises to 1 at the last step (BYOL); fixed: tau stays at tau_base (MoCo, ReSSL).
    tau_schedule: Literal["cosine", "fixed"] = "cosine"

    def schedule(self, step: int, derived: Derived) -> dict[str, float]:
        tau = schedules.tau(step + 1, derived.total_steps, self.tau_base, self.tau_schedule)
        return super().schedule(step, derived) | {"tau": tau}


class BetaRecipe(Recipe):
    """The fields of RSA and of SimSiam with RSA."""

    beta_base: float = Field(ge=0, le=1)  # the weight of aggressive pairs at the start
    # cosine: beta falls to 0 at the last step (PAPER Eq. 6); fixed: it stays (PAPER Table 1).
    beta_schedule: Literal["cosine", "fixed"] = "cosine"

    def schedule(self, step: int, derived: Derived) -> dict[str, float]:
        beta = schedules.beta(step + 1, derived.total_steps, self.beta_base, self.beta_schedule)
        return super().schedule(step, derived) | {"beta": beta}


class TargetMethod(Method):
    """A method with an online network that learns and a target network that follows it.

    The target network gets no gradient.
    """

    def __init__(self, recipe: Recipe, online: Projected) -> None:
        super().__init__(recipe, online.encoder)
        self.online = online
        # The target's BatchNorm layers run in training mode on batch statistics, as in the
        # reference code. Their running statistics drift on their own and are never read.
        self.target = copy.deepcopy(online).requires_grad_(False)

    @torch.no_grad()
    def after_step(self, now: Now) -> None:
        """Move the weights: target = tau * target + (1 - tau) * online, with tau = now["tau"].

        BatchNorm buffers do not move. This is called after the optimiser step with the tau of the
        next step. In the reference codes (RSA, MoCo, ReSSL) the target moves in the next forward,
        before it is used, so every forward sees the same target there as here.
        """
        targets: list[Tensor] = list(self.target.parameters())
        onlines: list[Tensor] = list(self.online.parameters())
        torch._foreach_lerp_(targets, onlines, 1 - now["tau"])


class QueueRecipe(TargetRecipe):
    """The fields of methods that compare embeddings with a queue of past ones."""

    out_dim: int = Field(ge=1)  # D, length of an embedding
    queue_size: int = Field(ge=1)  # K, embeddings in the queue
    temperature: float = Field(gt=0)  # divides the similarities before the softmax

    @model_validator(mode="after")
    def queue_holds_a_step(self) -> QueueRecipe:
        if self.queue_size < 2 * self.batch_size:
            raise ValueError(
                f"queue_size = {self.queue_size} is less than the two views of {self.batch_size} "
                "images"
            )
        return self


class QueueMethod(TargetMethod):
    """A method with a queue of past target outputs, `(D, K)`, which starts as noise of unit length.

    The target network normalises the global batch in `bn_groups` parts, each with its own
    BatchNorm statistics, as the online network does. If both saw the same parts, the statistics
    would reveal which images belong together. The target's batch is therefore shuffled (ShuffleBN).
    """

    queue: Tensor
    pointer: Tensor

    def __init__(self, recipe: QueueRecipe, encoder: Encoder, hidden_dim: int) -> None:
        head = mlp_without_bn(encoder.feature_dim, hidden_dim, recipe.out_dim)
        super().__init__(recipe, Projected(encoder, head))
        self.temperature, self.bn_groups = recipe.temperature, bn_groups(recipe.bn)
        noise = torch.randn(recipe.out_dim, recipe.queue_size)  # (D, K)
        self.register_buffer("queue", F.normalize(noise, dim=0))
        # The next column to replace.
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def keys(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Unit-length target outputs without gradient, in the order of the images.

        Takes `(B, 3, H, W)` and returns this rank's `(B, D)` and those of all ranks, `(N, D)`.
        """
        if self.bn_groups == 1:
            all_keys = gather(unit(self.target(images)))  # (N, D)
        else:
            # `gather` needs contiguous tensors. The images are channels_last in memory, so they are
            # contiguous once the channels are the last dimension.
            all_images = gather(images.permute(0, 2, 3, 1))  # (N, H, W, 3)
            order = shuffle(len(all_images), self.bn_groups, images.device)  # (N,)
            mine = order.chunk(world_size())[rank()]  # (B,)
            shuffled_images = all_images[mine].permute(0, 3, 1, 2)  # (B, 3, H, W)
            shuffled_keys = gather(unit(self.target(shuffled_images)))  # (N, D)
            all_keys = torch.empty_like(shuffled_keys).index_copy_(0, order, shuffled_keys)
        return all_keys[rank() * len(images) :][: len(images)], all_keys

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest columns of the queue by `keys`, `(n, D)`.

        The pointer stays on the device, so nothing waits for it.
        """
        size = self.queue.shape[1]  # K
        columns = (self.pointer + torch.arange(len(keys), device=keys.device)) % size  # (n,)
        self.queue.index_copy_(1, columns, keys.T.to(self.queue.dtype))
        self.pointer.add_(len(keys)).remainder_(size)


def shuffle(count: int, groups: int, device: torch.device) -> Tensor:
    """A permutation `(count,)` that spreads each of `groups` consecutive parts over all parts.

    The permutation is always the same. Which images share a batch changes at random every epoch,
    so a random permutation would add nothing, and its generator would have to be saved and kept
    equal on all ranks.
    """
    return torch.arange(count, device=device).view(groups, -1).T.flatten()


def mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """BYOL's head: linear, BatchNorm, ReLU, linear without bias. No BatchNorm at the output."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, out_dim, bias=False),
    )


def mlp_without_bn(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """The head of MoCo v2 and ReSSL: linear, ReLU, linear."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, out_dim)
    )


def unit(x: Tensor) -> Tensor:
    """The rows of `x`, `(B, D)`, scaled to unit length, in float32 or, for float64, in float64."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


def build_method(recipe: Recipe, own: nn.Module | None = None) -> Method:
    """A freshly initialised method for a recipe, channels_last, on the CPU.

    `own` is the network that the arch `own` means; the method gets a copy.
    The weights depend on torch's global generator, so seed it first. Raises ValueError when the
    recipe's `bn` does not suit the number of ranks.
    """
    groups = bn_groups(recipe.bn, recipe.accumulate)
    encoder = build_encoder(recipe, own)
    method = convert_batchnorm(method_class(recipe.method)(recipe, encoder), groups)
    method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in the stubs
    return method
