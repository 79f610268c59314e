"""DINO (Caron et al., ICCV 2021) on a ResNet: a student learns its teacher's distributions.

Source: github.com/facebookresearch/dino.

A head gives each crop K scores. With the scores t of the target network (teacher), those s of the
online network (student), the centre c and the temperatures T_t and T_s, the loss is the batch mean
of

    1 / (2 (V - 1)) sum_{i, v != i} -softmax((t_i - c) / T_t) . log softmax(s_v / T_s),

where i is one of the first two crops, and v is one of all V crops. The teacher reads only the first
two. After the loss, c moves towards the mean of t over both crops and all ranks. The gradient
reaches the online network only. The target network is a moving average of it. The aggressive views
of all crops are read.

The rows for ImageNet are those of the README's command for a ResNet-50. The released network was
trained with other numbers. As in the code, all crops of one size pass through the encoder together,
and the last layer is not updated in the first epoch. That layer's weight normalisation with a fixed
gain of 1 is written as a division by the norm, so its weight is the only parameter. The scores are
computed in float32, because T_t magnifies their rounding by 25.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from rsa_fast.distributed import gather
from rsa_fast.methods.method import (
    Loss,
    MultiCropRecipe,
    Now,
    TargetMethod,
    TargetRecipe,
    cross_view_entropy,
    joint_features,
    unit,
)
from rsa_fast.networks import Encoder, Projected
from rsa_fast.pipelines.views import Batch
from rsa_fast.sourced import Rows, cite


class DinoRecipe(TargetRecipe, MultiCropRecipe):
    """`temperature` is the student's."""

    hidden_dim: int = Field(ge=1)  # units of the head's two hidden layers
    bottleneck_dim: int = Field(ge=1)  # D, length of the embedding before the last layer
    out_dim: int = Field(ge=1)  # K, scores
    teacher_temperature: float = Field(gt=0)  # divides the teacher's centred scores
    centre_momentum: float = Field(ge=0, lt=1)  # the weight of the old centre when it moves
    head_bn: bool  # a BatchNorm before each GELU of the head (DINO's use_bn_in_head)


class Dino(TargetMethod):
    """DINO with any number of crops, of which the teacher reads the first two."""

    recipe_type = DinoRecipe
    # No source trains DINO at 32 or 64 px in the setting of the other methods here. For these
    # sizes, the optimiser and the rest of the augmentation are those of PAPER 4.1 for all methods.
    # After three epochs of the demo (width=8), the kNN score was 39% with the rows below, 29% with
    # a tau_base of .97, and 18% if the head also had no BatchNorm: then the loss stayed at ln K.
    rows: ClassVar[Rows] = {
        "all": cite(
            "DINO main_dino.py, vision_transformer.py",
            temperature=0.1,
            teacher_temperature=0.04,
            centre_momentum=0.9,
            hidden_dim=2048,
            bottleneck_dim=256,
            tau_base=0.996,
            frozen_epochs=1,
        )
        | cite("DINO main_dino.py: torchvision's default", zero_init_residual=False)
        | cite("chosen: without it, the scores of small runs become uniform", head_bn=True)
        | cite("solo-learn's CIFAR and ImageNet-100 runs", out_dim=4096)
        | cite(
            "solo-learn's CIFAR runs, which have no local crops and no blur",
            views={
                "groups": (
                    {"name": "global_1", "count": 1},
                    {"name": "global_2", "count": 1, "solarize_p": 0.2},
                )
            },
        ),
        "224px": cite(
            "DINO README: the command for a ResNet-50",
            optimizer="sgd",
            base_lr=0.03,
            min_lr=1e-6,
            warmup_epochs=10,
            weight_decay=1e-4,
            clip_each_grad_norm=3.0,
        )
        | cite("DINO utils.py get_params_groups", decay_exclude="norm_and_bias")
        | cite("DINO utils.py cosine_scheduler", lr_per="step")
        | cite(
            "DINO main_dino.py DataAugmentationDINO, with the areas of the README's command",
            views={
                "interpolation": "bicubic",
                "crop_area": (0.14, 1.0),
                "saturation": 0.2,
                "groups": (
                    {"name": "global_1", "count": 1, "blur_p": 1.0},
                    {"name": "global_2", "count": 1, "blur_p": 0.1, "solarize_p": 0.2},
                    {"name": "local", "count": 8, "size_px": 96, "crop_area": (0.05, 0.14)},
                ),
            },
        ),
        "imagenet1k": cite("DINO README: the command for a ResNet-50", batch_size=512)
        | cite("DINO main_dino.py", out_dim=65_536, head_bn=False),
        "short": cite("chosen: runs of few steps", tau_base=0.99),
    }

    centre: Tensor

    def __init__(self, recipe: DinoRecipe, encoder: Encoder) -> None:
        head = Head(
            in_dim=encoder.feature_dim,
            hidden_dim=recipe.hidden_dim,
            bottleneck_dim=recipe.bottleneck_dim,
            out_dim=recipe.out_dim,
            bn=recipe.head_bn,
        )
        super().__init__(recipe, Projected(encoder, head))
        self.views = recipe.views.names("aggressive")
        self.reads = frozenset(self.views)
        self.temperature = recipe.temperature
        self.teacher_temperature = recipe.teacher_temperature
        self.centre_momentum = recipe.centre_momentum
        self.register_buffer("centre", torch.zeros(recipe.out_dim))  # (K,)

    def forward(self, batch: Batch, now: Now) -> Loss:
        """The loss, which is ln K if all scores are equal. Then the centre moves."""
        views = [batch.views[name] for name in self.views]
        # The target goes first to save memory, as in Byol.
        targets = self.targets(views[:2])  # (2, B, K)
        z, scores = outputs(self.online, views)  # (V, B, D), (V, B, K)
        loss = cross_view_entropy(targets, (scores / self.temperature).log_softmax(-1))
        return Loss(loss, z[0], {})

    @torch.no_grad()
    def targets(self, views: Sequence[Tensor]) -> Tensor:
        """The teacher's distributions `(2, B, K)` for two views `(B, 3, S, S)`.

        Afterwards the centre moves towards the mean of the scores of all ranks.
        """
        _, scores = outputs(self.target, views)  # (2, B, K)
        targets = ((scores - self.centre) / self.teacher_temperature).softmax(-1)
        mean = gather(scores.mean((0, 1))[None]).mean(0)  # (K,)
        self.centre.lerp_(mean, 1 - self.centre_momentum)
        return targets

    def after_backward(self, now: Now) -> None:
        """The last layer is not updated while it is frozen."""
        if now["frozen"]:
            cast(Head, self.online.projector).last.weight.grad = None


class Head(nn.Module):
    """DINO's head, from features `(B, in_dim)` to embeddings of unit length and their scores.

    The scores are the cosines between the embedding and the rows of the last layer's weight.
    """

    def __init__(
        self, in_dim: int, hidden_dim: int, bottleneck_dim: int, out_dim: int, bn: bool
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential()
        for width in (in_dim, hidden_dim):
            self.mlp.append(nn.Linear(width, hidden_dim))
            if bn:
                self.mlp.append(nn.BatchNorm1d(hidden_dim))
            self.mlp.append(nn.GELU())
        self.mlp.append(nn.Linear(hidden_dim, bottleneck_dim))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last = nn.Linear(bottleneck_dim, out_dim, bias=False)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        z = unit(self.mlp(features))  # (B, D)
        with torch.autocast(z.device.type, enabled=False):
            return z, F.linear(z, unit(self.last.weight))  # (B, D), (B, K)


def outputs(network: Projected, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The embeddings `(V, B, D)` and scores `(V, B, K)` of V views `(B, 3, S, S)`."""
    z, scores = network.projector(joint_features(network.encoder, views))
    return z.unflatten(0, (len(views), -1)), scores.unflatten(0, (len(views), -1))
