"""The base class of all methods, and what those with a target network, queue, bank or jigsaw share.

In shapes, B is the number of images on this rank, N that on all ranks together (N = B with one
process), D is `out_dim`, and K is `queue_size` or the number of `negatives`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from rsa_fast import schedules
from rsa_fast.distributed import gather, rank, world_size
from rsa_fast.methods import method_class, short_name
from rsa_fast.networks import Encoder, Projected, build_encoder
from rsa_fast.pipelines.device_ops import send
from rsa_fast.pipelines.draws import hash_keys
from rsa_fast.pipelines.views import Batch
from rsa_fast.recipes import Derived, Recipe
from rsa_fast.sourced import Rows, cite
from rsa_fast.syncbn import bn_groups, convert_batchnorm

if TYPE_CHECKING:
    from rsa_fast.evaluation.evaluate import Evaluation

PAIRS = {"AA": ("aggressive_1", "aggressive_2"), "AW": ("aggressive_1", "weak_2")}
BETA_ROWS = {"all": cite("PAPER 4.1", beta_base=0.4), "32px": cite("PAPER 4.1", beta_base=0.3)}
QUEUE_FIELDS = {
    **cite("MoCo builder.py, ReSSL backbone.py", zero_init_residual=False),
    **cite("MoCo v2", tau_schedule="fixed"),
}
# BatchNorm normalises parts of 32 images, on 1, 2, 4 or 8 GPUs. If one GPU had only one part,
# ShuffleBN would have nothing to shuffle.
EIGHT_GPUS = cite(
    "MoCo, ReSSL ressl.py: 256 images on 8 GPUs; on ImageNet-100, split:4 restores the 4 GPUs of "
    "PAPER Table 7 with 64 images each",
    bn="split:8",
)
# SimCLR's colour jitter, twice as strong as MoCo v2's.
STRONG_JITTER = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
PATCHES = 9  # in a jigsaw
# The random numbers of a step have their own hash seeds: the run's seed XOR one of these.
NEGATIVES_SALT, PATCHES_SALT = 0x6E65676174697665, 0x70617463686573
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
    dataset. `reads` names the views that `forward` uses. The loader makes only these. `encoder` is
    the network that is trained for later use. `mean_over_images` is true if the loss is a mean of
    independent terms, one for each image, except for the effect of BatchNorm. The gradient may then
    be accumulated over parts of a batch.

    A method is built from its recipe and an encoder. It copies what it needs from the recipe.
    """

    recipe_type: ClassVar[type[Recipe]]
    rows: ClassVar[Rows]
    reads: frozenset[str]
    mean_over_images: ClassVar[bool] = False
    encoder: Encoder

    def __init__(self, recipe: Recipe, encoder: Encoder) -> None:
        super().__init__()
        # nn.Module would register the encoder here, and a state dict would contain it twice. It is
        # registered as a part of the subclass's network.
        object.__setattr__(self, "encoder", encoder)

    def forward(self, batch: Batch, now: Now) -> Loss:
        """The loss of one step on this rank's batch.

        `now` contains the values of the recipe's `schedule` at this step.
        """
        raise NotImplementedError

    def allocate(self, images: int) -> None:
        """Create what depends on the number of training images, such as a memory bank.

        Called once, after the method is built and before it is moved to the device.
        """

    def after_backward(self, now: Now) -> None:
        """Called before every optimiser step. The step skips parameters whose `.grad` is None."""

    def after_step(self, now: Now) -> None:
        """Called after every optimiser step, with the schedule's values at the next step."""

    def constant_lr_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters whose learning rate stays at its peak during the whole run."""
        return ()

    def lr_ratios(self) -> Mapping[nn.Parameter, float]:
        """For some parameters, their learning rate divided by that of the recipe."""
        return {}

    def score(self, evaluation: Evaluation, protocols: tuple[str, ...]) -> dict[str, Any]:
        """The scores during and after training. Every rank calls this, and all get the same scores.

        `protocols` are the ones that the engine requests at this point of the run.
        """
        return evaluation.score(self.encoder, protocols)

    def summary(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What the result of a complete run contains besides its last scores.

        `records` are all records of metrics.jsonl.
        """
        return {}


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


class MultiCropRecipe(Recipe):
    """The fields of methods whose first two crops are the targets of all crops: SwAV and DINO."""

    temperature: float = Field(gt=0)  # divides the scores of all crops before the softmax
    frozen_epochs: int = Field(ge=0)  # the first epochs, without updates of the last layer

    @model_validator(mode="after")
    def crops_have_targets(self) -> MultiCropRecipe:
        if (crops := len(self.views.crops)) < 2:
            raise ValueError(
                f"views.groups has {crops} crop, wanted 2 or more: the first two of an image are "
                "the targets of the others"
            )
        return self

    @model_validator(mode="after")
    def crops_pass_together(self) -> MultiCropRecipe:
        if self.bn.startswith("split:"):
            raise ValueError(
                f"bn = {self.bn} cuts a batch into equal parts. All crops of one size pass "
                "together, so that the parts would be crops: use sync or local"
            )
        return self

    def schedule(self, step: int, derived: Derived) -> dict[str, float]:
        frozen = step < self.frozen_epochs * derived.steps_per_epoch
        return super().schedule(step, derived) | {"frozen": float(frozen)}


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
    def queue_exceeds_a_step(self) -> QueueRecipe:
        if self.queue_size < 2 * self.batch_size:
            raise ValueError(
                f"queue_size = {self.queue_size} is less than the two views of {self.batch_size} "
                f"images: raise it to {2 * self.batch_size} or more"
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


class StepRecipe(Recipe):
    """The recipes of methods whose random numbers depend on the number of the step."""

    def schedule(self, step: int, derived: Derived) -> dict[str, float]:
        return super().schedule(step, derived) | {"step": step}


class BankRecipe(StepRecipe):
    """The fields of methods with a bank, which contains one embedding for every image."""

    out_dim: int = Field(ge=1)  # D, length of an embedding
    # K, the rows of the bank that an image's own row is compared with. They are drawn in every
    # step. All rows are used if this is 0, or at least the number of images.
    negatives: int = Field(ge=0)
    temperature: float = Field(gt=0)  # divides the similarities before the softmax
    # The weight of a row's old value when its image's new embedding is added.
    bank_momentum: float = Field(ge=0, lt=1)


class BankMethod(Method):
    """A method with a bank of one embedding for every training image, `(images, D)`.

    Its rows have unit length and start as noise. The bank is the same on all ranks. The network
    has a linear projector.
    """

    bank: Tensor

    def __init__(self, recipe: BankRecipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder)
        self.online = Projected(encoder, nn.Linear(encoder.feature_dim, recipe.out_dim))
        self.out_dim, self.negatives, self.seed = recipe.out_dim, recipe.negatives, recipe.seed
        self.temperature, self.bank_momentum = recipe.temperature, recipe.bank_momentum

    def allocate(self, images: int) -> None:
        self.register_buffer("bank", unit(torch.randn(images, self.out_dim)))

    def bank_losses(self, batch: Batch, embeddings: Sequence[Tensor], now: Now) -> list[Tensor]:
        """The cross-entropy of finding the images' rows in the bank, for each of `embeddings`.

        Each embedding is `(B, D)`, unit rows of the batch's images, and each loss is a scalar, the
        batch mean. All are compared with the same negatives, on all ranks. Afterwards, the first
        embedding is added to the bank. Raises ValueError for a batch without ids.
        """
        ids = batch.ids  # (B,)
        if ids is None:
            raise ValueError("this batch has no ids, which are its rows in the bank: pass ids=")
        # The backward pass needs the rows as they are now, and `update_bank` changes them in place.
        if 0 < self.negatives < len(self.bank):
            negatives = negative_ids(self.seed, now, self.negatives, len(self.bank))  # (K,)
            own, others = self.bank[ids], self.bank[send(negatives, ids.device)].T  # (B, D), (D, K)
            losses = [info_nce(v, own, others, self.temperature) for v in embeddings]
        else:
            rows = self.bank.T.clone()  # (D, images)
            with torch.autocast(ids.device.type, enabled=False):
                losses = [F.cross_entropy(v @ rows / self.temperature, ids) for v in embeddings]
        self.update_bank(embeddings[0], ids)
        return losses

    @torch.no_grad()
    def update_bank(self, embeddings: Tensor, ids: Tensor) -> None:
        """Add the embeddings `(B, D)` of all ranks to the rows `ids`, `(B,)`: a moving average.

        If an image is in the global batch more than once, its last embedding counts.
        """
        all_embeddings, all_ids = gather(embeddings.detach()), gather(ids)  # (N, D), (N,)
        # For every row of the batch, the last row of the same image. All rows of an image thus get
        # the same value, and the order in which they are written does not matter.
        ordered, order = all_ids.sort(stable=True)
        last = order[torch.searchsorted(ordered, all_ids, right=True) - 1]  # (N,)
        new = all_embeddings[last].to(self.bank.dtype)
        mean = torch.lerp(new, self.bank[all_ids], self.bank_momentum)  # (N, D)
        self.bank.index_copy_(0, all_ids, unit(mean))


class JigsawRecipe(StepRecipe):
    """The fields of methods that read the patches of a jigsaw and `image_crops` other crops."""

    image_crops: ClassVar[int]

    @model_validator(mode="after")
    def groups_are_the_image_and_its_jigsaw(self) -> JigsawRecipe:
        counts = {group.name: group.count for group in self.views.groups}
        if counts != {"image": self.image_crops, "jigsaw": 1} or not self.views.crops[-1].jigsaw:
            listed = " and ".join(f"{count} of {name!r}" for name, count in counts.items())
            raise ValueError(
                f"views.groups = {listed}: {short_name(self.method)} takes {self.image_crops} of "
                "'image' and then 1 of 'jigsaw' with jigsaw = true"
            )
        return self


def jigsaw_rows(**image: Any) -> Rows:
    """The groups of crops of a `JigsawRecipe`. `image` contains the fields of the first group."""

    def views(size_px: int) -> dict[str, Any]:
        jigsaw = {"count": 1, "size_px": size_px, "crop_area": (0.6, 1.0), "jigsaw": True}
        return {"groups": [{"name": "image", **image}, {"name": "jigsaw", **jigsaw}]}

    source = "PyContrast datasets/util.py"
    in_proportion = f"{source}; chosen: a jigsaw in proportion to that of 255 px for 224 px"
    return {
        "32px": cite(in_proportion, views=views(36)),
        "64px": cite(in_proportion, views=views(72)),
        "224px": cite(source, views=views(255)),
    }


class JigsawHead(nn.Module):
    """The head for the nine patches of a jigsaw: a projector for each, and a linear layer for all.

    The layer gets the patches in a random order. The encoder does not depend on their order, so
    shuffling its outputs is the same as shuffling the patches.
    """

    def __init__(self, projector: nn.Module, out_dim: int) -> None:
        super().__init__()
        self.projector, self.join = projector, nn.Linear(PATCHES * out_dim, out_dim)

    def forward(self, features: Tensor, orders: np.ndarray) -> Tensor:
        """Map features of patches, `(9B, feature_dim)`, in the `orders`, `(B, 9)`, to `(B, D)`."""
        patches = self.projector(features).unflatten(0, (-1, PATCHES))  # (B, 9, D)
        order = send(orders, features.device)[..., None]  # (B, 9, 1)
        joined: Tensor = self.join(torch.take_along_dim(patches, order, 1).flatten(1))
        return joined


def patch_orders(seed: int, now: Now, images: int) -> np.ndarray:
    """A random order of the nine patches for each of this rank's images in a step, `(B, 9)`."""
    rows = rank() * images + np.arange(images)  # of the global batch
    numbers = rows[:, None] * PATCHES + np.arange(PATCHES)  # (B, 9)
    return np.argsort(hash_keys(seed ^ PATCHES_SALT, int(now["step"]), numbers), 1)


def negative_ids(seed: int, now: Now, count: int, images: int) -> np.ndarray:
    """The `count` random negatives of a step, out of `images`. They may repeat.

    They are the same on all ranks.
    """
    keys = hash_keys(seed ^ NEGATIVES_SALT, int(now["step"]), np.arange(count))
    ids: np.ndarray = (keys % np.uint64(images)).astype(np.int64)
    return ids


def joint_features(encoder: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """The features of V views `(B, 3, S, S)`, in the order of the views: `(V B, feature_dim)`.

    Consecutive views of one size pass through the encoder together, so BatchNorm normalises them
    together.
    """
    parts = [list(part) for _, part in groupby(views, key=lambda view: view.shape[-1])]
    return torch.cat([encoder(torch.cat(part)) for part in parts])


def cross_view_entropy(targets: Tensor, log_predictions: Tensor) -> Tensor:
    """The cross-entropy between the targets of two crops and the predictions of all other crops.

    Takes the distributions `targets`, `(2, B, K)`, which belong to the first two of V crops, and
    the logarithms of the predicted distributions, `(V, B, K)`. Returns the mean over the 2 (V - 1)
    pairs and the batch, a scalar.
    """
    others = log_predictions.sum(0) - log_predictions[:2]  # (2, B, K)
    return -(targets * others).sum(2).mean() / (len(log_predictions) - 1)


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """The batch mean of the cross-entropy of finding each query's key among it and the queue.

    Takes unit rows `q` and `k`, `(B, D)`, and `queue`, `(D, K)`, and returns a scalar.
    """
    with torch.autocast(q.device.type, enabled=False):
        positive = (q * k).sum(1, keepdim=True)  # (B, 1)
        logits = torch.cat([positive, q @ queue], 1) / temperature  # (B, 1 + K)
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))


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

    `own` is the network for the arch `own`. The method gets a copy of it. The weights depend on
    torch's global generator, so seed it first. Raises ValueError when the recipe's `bn` does not
    suit the number of ranks.
    """
    groups = bn_groups(recipe.bn, recipe.accumulate)
    encoder = build_encoder(recipe, own)
    method = convert_batchnorm(method_class(recipe.method)(recipe, encoder), groups)
    method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in the stubs
    return method
