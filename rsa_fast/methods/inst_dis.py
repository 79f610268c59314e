"""Instance discrimination (InstDis; Wu et al., CVPR 2018), with a cross-entropy in place of NCE.

Sources: github.com/zhirongw/lemniscate.pytorch (InstDis) and the re-implementation in
github.com/HobbitLong/PyContrast.

Every training image is a class of its own, and a bank contains one embedding m of each. With the
unit-length embedding v of the image i and the temperature T, the loss is the batch mean of

    -log(exp(v.m_i / T) / (exp(v.m_i / T) + sum_j exp(v.m_j / T))),

where j runs over K random images, or over all images except i. The random images may include i, and
they may repeat. Once the loss is computed, v is added to the bank: m_i = (m_i + v) / |m_i + v|, for
a `bank_momentum` of 0.5.

The paper approximates this loss by noise-contrastive estimation (NCE). PyContrast and the authors'
updated model compute the cross-entropy itself, with 65,536 random images. The authors' CIFAR-10
recipe computes it with all images. PyContrast and the authors draw different random images for each
image of the batch. Here all images of a step share one set, which is the same on all ranks. The
expectation is the same, and the similarities are one matrix product. The set depends on the seed
and the step only.

The gradient reaches the network through v only. One aggressive view and the sample ids are read.
"""

from __future__ import annotations

from typing import ClassVar

from rsa_fast.methods.method import BankMethod, BankRecipe, Loss, Now, unit
from rsa_fast.pipelines.views import Batch
from rsa_fast.sourced import Rows, cite

# What InstDis and PIRL have in common.
BANK_ROWS: Rows = {
    "all": cite(
        "InstDis cifar.py", out_dim=128, bank_momentum=0.5, zero_init_residual=False, bn="local"
    )
    | cite("InstDis README: the CIFAR-10 command", negatives=0, temperature=0.1)
    | cite("InstDis README: the CIFAR-10 command, 0.03 for 128 images", base_lr=0.06)
    | cite("InstDis cifar.py: on all parameters", weight_decay=5e-4, decay_exclude="none")
    | cite("chosen: a cosine, where InstDis divides by 10 after 120 and 160 epochs", lr_per="epoch")
    | cite(
        "InstDis cifar.py, PyContrast datasets/util.py: jitter of every view, and no blur",
        views={"jitter_p": 1.0, "hue": 0.4, "blur_p": 0.0},
    ),
    "224px": cite(
        "PyContrast base_options.py",
        negatives=65_536,
        temperature=0.07,
        base_lr=0.03,
        weight_decay=1e-4,
    )
    | cite("PyContrast base_trainer.py", min_lr=3e-5)
    | cite("PyContrast datasets/util.py", views={"crop_area": (0.08, 1.0)})
    | cite("PyContrast RUN.md: 256 images on 8 GPUs", bn="split:8"),
    "imagenet1k": cite(
        "PyContrast base_options.py, main_contrast.py",
        optimizer="sgd",
        batch_size=256,
        warmup_epochs=0,
    ),
}


class InstDisRecipe(BankRecipe):
    pass


class InstDis(BankMethod):
    """Instance discrimination on the first aggressive view."""

    recipe_type = InstDisRecipe
    rows: ClassVar[Rows] = BANK_ROWS | {"32px": cite("InstDis cifar.py", views={"flip_p": 0.0})}
    reads = frozenset({"aggressive_1"})

    def forward(self, batch: Batch, now: Now) -> Loss:
        """The loss against the current bank. Then all ranks' embeddings are added to the bank."""
        v = unit(self.online(batch.aggressive_1))  # (B, D)
        (loss,) = self.bank_losses(batch, [v], now)
        return Loss(loss, v, {})
