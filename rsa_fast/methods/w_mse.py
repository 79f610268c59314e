"""W-MSE (Ermolov et al., ICML 2021): the mean squared error of whitened embeddings.

Source: github.com/htdt/self-supervised, methods/w_mse.py, methods/whitening.py.

There is one network. The global batch is divided at random into groups of 2 D images. In every
group, the embeddings h, (2 D, D), of a view are whitened: with their mean m, their covariance C,
divided by 2 D - 1, and its Cholesky factor L, C = L L^T,

    z = L^-1 (h - m).

Thus z has the covariance I and cannot collapse. The loss is the mean of |z_i - z_j|^2 over the
images, over all pairs of an image's views, and over `w_iter` divisions into groups, where the z are
scaled to unit length. It lies between 0 and 4. The gradient flows through all views, through the
means, covariances and factors, and through the images of other ranks.

All aggressive views are read: an image has as many positives as crops. By default it has two (W-MSE
2). W-MSE 4 has batches of 256 images on all of the authors' datasets, w_iter=1, and

    views.groups=[{name: crops, count: 4}]

The loss, the head and the numbers are those of the code. The head normalises all views together.
Three things differ:

- The code jitters the colours before it crops. Here the crop comes first, as in all other methods.
- The code computes the loss on one GPU. Here the groups are drawn from the images of all ranks, so
  that the result does not depend on the number of ranks.
- W-MSE 2 has 512 images on small datasets in the code. Here it has 256, as in PAPER 4.1 and W-MSE
  4, with the same learning rate.

The authors' runs on ImageNet-1K used SimCLR v2's code, and only their loss is public.
"""

from __future__ import annotations

from itertools import combinations
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from rsa_fast.distributed import gather
from rsa_fast.methods.method import STRONG_JITTER, Loss, Method, Now, StepRecipe, mlp, unit
from rsa_fast.networks import Encoder, Projected
from rsa_fast.pipelines.device_ops import send
from rsa_fast.pipelines.draws import hash_keys
from rsa_fast.pipelines.views import Batch
from rsa_fast.sourced import Rows, cite
from rsa_fast.syncbn import at_least_float32

GROUP_DRAWS = 0x67726F757073  # the groups are independent of the views
# The number of images in a group for each dimension. It is the optimum that the author found (issue
# 7 of W-MSE's code). With only about as many images as dimensions, the covariance is singular.
IMAGES_PER_DIM = 2


SMALL_VIEWS = cite(
    "W-MSE's code", views={"interpolation": "bicubic", "grayscale_p": 0.1, "blur_p": 0.0}
)


class WMseRecipe(StepRecipe):
    hidden_dim: int = Field(ge=1)  # units of the head's hidden layer
    out_dim: int = Field(ge=2)  # D, length of an embedding; 2 D images are whitened together
    w_iter: int = Field(1, ge=1)  # the loss is the mean over so many divisions into groups

    @model_validator(mode="after")
    def groups_fill_the_batch(self) -> WMseRecipe:
        group = IMAGES_PER_DIM * self.out_dim
        if self.batch_size % group:
            raise ValueError(
                f"batch_size = {self.batch_size} is not a multiple of {group}: that many images "
                f"are whitened together, {IMAGES_PER_DIM} for each of out_dim = {self.out_dim}; "
                "choose another batch_size, or a lower out_dim"
            )
        return self

    @model_validator(mode="after")
    def images_have_pairs(self) -> WMseRecipe:
        if len(self.views.crops) < 2:
            raise ValueError(
                "views.groups has 1 crop: w-mse compares the crops of an image with each other, "
                "so it takes 2 or more"
            )
        return self


class WMse(Method):
    """W-MSE with as many positives as there are crops."""

    recipe_type = WMseRecipe
    rows: ClassVar[Rows] = {
        "all": cite("W-MSE's code", optimizer="adam", hidden_dim=1024, out_dim=64)
        | cite("W-MSE's code: in the gradient, on all parameters", weight_decay=1e-6)
        | cite("W-MSE README: CIFAR", peak_lr=3e-3)
        | cite("W-MSE's code: 500 steps", warmup_epochs=3)
        | cite("W-MSE's code", lr_drop_epochs=(-50, -25), lr_drop=0.2)
        | cite("chosen: the code's one GPU sees the whole batch", bn="sync"),
        "32px": SMALL_VIEWS,
        "64px": cite("W-MSE README: Tiny ImageNet, STL-10", out_dim=128, peak_lr=2e-3)
        | cite("W-MSE README: Tiny ImageNet, STL-10; 1 with 4 positives", w_iter=4)
        | cite("W-MSE's code: 500 steps", warmup_epochs=1)
        | SMALL_VIEWS,
        "224px": cite(
            "W-MSE's code: ImageNet-100",
            views={
                "interpolation": "bicubic",
                "crop_area": (0.08, 1.0),
                **STRONG_JITTER,
                "grayscale_p": 0.2,
                "blur_p": 0.5,
            },
        )
        | cite("W-MSE's code: ImageNet-100", peak_lr=2e-3)
        | cite("W-MSE's code: 500 steps", warmup_epochs=1)
        | cite("chosen: a cosine, for runs of any length", lr_drop_epochs=()),
        "imagenet100": cite(
            "W-MSE's code: ImageNet-100", out_dim=128, lr_drop_epochs=(-50, -25), lr_drop=0.2
        ),
        "imagenet1k": cite("PAPER Table 4", batch_size=4096)
        | cite("chosen: ImageNet-100's", out_dim=128)
        | cite(
            "chosen: SimCLR's, whose code the authors used with another learning rate",
            optimizer="lars",
            base_lr=0.3,
            peak_lr=None,
            weight_decay=1e-4,
            warmup_epochs=10,
            lr_per="step",
        ),
        "short": cite("chosen: batches of 16 images and more", out_dim=8)
        | cite("chosen: runs of few steps", warmup_epochs=1, lr_drop_epochs=()),
    }

    def __init__(self, recipe: WMseRecipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder)
        head = mlp(encoder.feature_dim, recipe.hidden_dim, recipe.out_dim)
        self.online = Projected(encoder, head)
        self.views = recipe.views.names("aggressive")
        self.reads = frozenset(self.views)
        self.seed, self.w_iter = recipe.seed, recipe.w_iter

    def forward(self, batch: Batch, now: Now) -> Loss:
        """The loss of the global batch.

        `condition` is the mean of a lower bound of the covariances' condition numbers. It rises
        when dimensions of the embeddings collapse, which the loss does not show.
        """
        features = [self.online.encoder(batch.views[name]) for name in self.views]  # V of (B, F)
        # The head sees the views of an image one after the other, so that the parts of the batch
        # which `bn` normalises contain whole images.
        h = self.online.projector(torch.stack(features, 1).flatten(0, 1))  # (B * V, D)
        h = at_least_float32(h).view(-1, len(self.views), h.shape[1])  # (B, V, D)
        every = gather(h)  # (N, V, D)
        # `rsa-fast plan` looks at the images of one rank alone, which may be fewer than a group.
        count = max(1, len(every) // (IMAGES_PER_DIM * every.shape[2]))  # G, groups
        losses, conditions = [], []
        for i in range(self.w_iter):
            order = division(self.seed, int(now["step"]), i, len(every))
            rows = every[send(order, every.device)]  # (N, V, D)
            groups = rows.view(count, -1, *rows.shape[1:]).transpose(1, 2)  # (G, V, N / G, D)
            z, condition = whiten(groups)
            losses.append(w_mse(z))
            conditions.append(condition)
        parts = {"condition": torch.stack(conditions).mean()}
        return Loss(torch.stack(losses).mean(), unit(h[:, 0]), parts)


def division(seed: int, step: int, iteration: int, count: int) -> np.ndarray:
    """A permutation of the images of the global batch, `(count,)` int64, the same on all ranks."""
    keys = hash_keys(seed ^ GROUP_DRAWS, step, iteration, np.arange(count))
    return np.argsort(keys, kind="stable")


def whiten(h: Tensor) -> tuple[Tensor, Tensor]:
    """The embeddings `(..., n, D)` of n images, whitened, and a bound of the condition numbers.

    If a covariance is not positive definite, its images' z are NaN. A check that raises an error
    would have to wait for the device.
    """
    with torch.autocast(h.device.type, enabled=False):
        centred = h - h.mean(-2, keepdim=True)
        covariance = centred.mT @ centred / (h.shape[-2] - 1)  # (..., D, D)
        factor, fault = torch.linalg.cholesky_ex(covariance)
        factor = factor.masked_fill((fault > 0)[..., None, None], torch.nan)
        z = torch.linalg.solve_triangular(factor, centred.mT, upper=False).mT  # (..., n, D)
    pivots = factor.detach().diagonal(dim1=-2, dim2=-1)  # (..., D)
    return z, (pivots.amax(-1) / pivots.amin(-1)).square().mean()


def w_mse(z: Tensor) -> Tensor:
    """The mean of |z_i - z_j|^2 over all images and pairs of views, of unit rows.

    Takes z, `(G, V, n, D)` for G groups of n images with V views. Returns a scalar.
    """
    z = torch.nn.functional.normalize(z, dim=-1)
    pairs = combinations(z.unbind(1), 2)
    return torch.stack([(2 - 2 * (a * b).sum(-1)).mean() for a, b in pairs]).mean()
