"""InfoMin Aug. (Tian et al., NeurIPS 2020): MoCo v2 with stronger augmentation and a jigsaw.

Source: github.com/HobbitLong/PyContrast.

The embedding q of an image and the embedding w of a jigsaw of it must each find the target's key k
of a second view in a dictionary: that key and a queue of past keys m_1 ... m_K. With embeddings of
unit length and the temperature T, the loss is the batch mean of (ce(q) + ce(w)) / 2, where

    ce(x) = -log(exp(x.k / T) / (exp(x.k / T) + sum_j exp(x.m_j / T))).

There is one direction, so a step enqueues one key of each image. The views get MoCo v2's blur and
grayscale, twice its colour jitter, and RandAugment. The jigsaw is nine patches of a third crop,
without colour jitter. Each patch goes through the encoder and a head like that of MoCo v2. A linear
layer takes all nine results, in a random order that depends on the seed and the step only.

The gradient reaches the online network and the jigsaw's head. The target network is a moving
average of the online network. The code also averages the jigsaw's head, but never uses the average.
Here there is none. The blur is that of the other methods, whereas the code has a Gaussian of 23
taps. The code has a recipe for ImageNet. The rows for small images are our choice. Two aggressive
views and the patches are read.
"""

from __future__ import annotations

from typing import ClassVar

from rsa_fast.methods.method import (
    QUEUE_FIELDS,
    STRONG_JITTER,
    JigsawHead,
    JigsawRecipe,
    Loss,
    Now,
    QueueMethod,
    QueueRecipe,
    info_nce,
    jigsaw_rows,
    mlp_without_bn,
    patch_orders,
    unit,
)
from rsa_fast.networks import Encoder
from rsa_fast.pipelines.views import Batch
from rsa_fast.sourced import Rows, cite, merged_rows


class InfoMinRecipe(QueueRecipe, JigsawRecipe):
    image_crops = 2


class InfoMin(QueueMethod):
    """InfoMin Aug., whose heads have a hidden layer as wide as the encoder's features."""

    recipe_type = InfoMinRecipe
    rows: ClassVar[Rows] = merged_rows(
        {
            "all": QUEUE_FIELDS
            | cite("PAPER 4.1: .99 in all experiments", tau_base=0.99)
            | cite("PyContrast base_options.py", out_dim=128, temperature=0.15)
            | cite("MoCo's CIFAR-10 demo", bn="split:8", queue_size=4096)
            | cite("PyContrast datasets/util.py", views=STRONG_JITTER),
            "64px": cite("chosen: between the CIFAR demo's and ImageNet's", queue_size=16_384),
            "224px": cite("PyContrast base_options.py", queue_size=65_536)
            | cite("PyContrast RUN.md: 256 images on 8 GPUs", bn="split:8"),
            "imagenet1k": cite(
                "PyContrast base_options.py, main_contrast.py",
                optimizer="sgd",
                base_lr=0.03,
                batch_size=256,
                weight_decay=1e-4,
                warmup_epochs=0,
                tau_base=0.999,
            )
            | cite("PyContrast base_trainer.py", lr_per="epoch", min_lr=3e-5),
        },
        jigsaw_rows(count=2, rand_augment=True),
    )

    def __init__(self, recipe: InfoMinRecipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder, hidden_dim=encoder.feature_dim)
        projector = mlp_without_bn(encoder.feature_dim, encoder.feature_dim, recipe.out_dim)
        self.jigsaw, self.seed = JigsawHead(projector, recipe.out_dim), recipe.seed
        self.image_views = recipe.views.names("aggressive", "image")
        (self.jigsaw_view,) = recipe.views.names("patches", "jigsaw")
        self.reads = frozenset({*self.image_views, self.jigsaw_view})

    def forward(self, batch: Batch, now: Now) -> Loss:
        """The mean of both losses against the current queue. Then the keys enter the queue."""
        one, two = (batch.view(name) for name in self.image_views)  # (B, 3, H, W)
        patches = batch.view(self.jigsaw_view)  # (B, 9, 3, P, P)
        k, all_k = self.keys(two)  # (B, D), (N, D)
        q = unit(self.online(one))  # (B, D)
        orders = patch_orders(self.seed, now, len(patches))  # (B, 9)
        w = unit(self.jigsaw(self.encoder(patches.flatten(0, 1)), orders))  # (B, D)
        queue = self.queue.clone()  # (D, K); `enqueue` changes it in place
        image = info_nce(q, k, queue, self.temperature)
        jigsaw = info_nce(w, k, queue, self.temperature)
        self.enqueue(all_k)
        return Loss((image + jigsaw) / 2, q, {"image": image, "jigsaw": jigsaw})
