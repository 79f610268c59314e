"""PIRL (Misra and van der Maaten, CVPR 2020): an image and its jigsaw have the same embedding.

Source: the re-implementation in github.com/HobbitLong/PyContrast. The authors' own is in
github.com/facebookresearch/vissl.

A bank contains one embedding m of every training image, as in InstDis. The embedding v of the image
i and the embedding w of a jigsaw of it, both of unit length, must each find the image in the bank.
With the temperature T, the loss is the batch mean of (ce(v) + ce(w)) / 2, where

    ce(x) = -log(exp(x.m_i / T) / (exp(x.m_i / T) + sum_j exp(x.m_j / T))),

and j runs over the same images for v and w: K random images, or all except i. v and w are not
compared with each other. Once the loss is computed, v is added to the bank, and w is not.

The jigsaw is nine patches of another crop of the image. Each goes through the encoder and a linear
layer. A second linear layer takes all nine results, in a random order that depends on the seed and
the step only. The image and the patches pass through the encoder one after the other, so BatchNorm
normalises each with its own statistics. Its running statistics average both.

As in PyContrast, the loss is the cross-entropy, and the patches have no colour jitter. VISSL has
NCE, 32,000 random images for each term, and colour jitter of every patch. One set of random images
for a step is our choice, as in InstDis. The rows for small images are our choice too, and their
jigsaws are smaller.

The gradient reaches the encoder and both heads, but not the bank. The first aggressive view, the
patches and the sample ids are read.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from rsa_fast.methods.inst_dis import BANK_ROWS
from rsa_fast.methods.method import (
    BankMethod,
    BankRecipe,
    JigsawHead,
    JigsawRecipe,
    Loss,
    Now,
    jigsaw_rows,
    patch_orders,
    unit,
)
from rsa_fast.networks import Encoder
from rsa_fast.pipelines.views import Batch
from rsa_fast.sourced import Rows, merged_rows


class PirlRecipe(BankRecipe, JigsawRecipe):
    image_crops = 1


class Pirl(BankMethod):
    """PIRL, whose heads are linear."""

    recipe_type = PirlRecipe
    rows: ClassVar[Rows] = merged_rows(BANK_ROWS, jigsaw_rows(count=1))

    def __init__(self, recipe: PirlRecipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder)
        projector = nn.Linear(encoder.feature_dim, recipe.out_dim)
        self.jigsaw = JigsawHead(projector, recipe.out_dim)
        (self.image_view,) = recipe.views.names("aggressive", "image")
        (self.jigsaw_view,) = recipe.views.names("patches", "jigsaw")
        self.reads = frozenset({self.image_view, self.jigsaw_view})

    def forward(self, batch: Batch, now: Now) -> Loss:
        """The mean of both losses against the current bank. Then v is added to the bank."""
        image = batch.view(self.image_view)  # (B, 3, H, W)
        patches = batch.view(self.jigsaw_view)  # (B, 9, 3, P, P)
        v = unit(self.online(image))  # (B, D)
        orders = patch_orders(self.seed, now, len(patches))  # (B, 9)
        w = unit(self.jigsaw(self.encoder(patches.flatten(0, 1)), orders))  # (B, D)
        image_loss, jigsaw_loss = self.bank_losses(batch, [v, w], now)
        return Loss((image_loss + jigsaw_loss) / 2, v, {"image": image_loss, "jigsaw": jigsaw_loss})
