"""ReSSL (Zheng et al., NeurIPS 2021): the student's relations match the teacher's.

Source: github.com/KyleZheng1997/ReSSL.

The relations of an image are the softmax over its similarities to a queue of past embeddings
m_1 ... m_K. With the unit-length online embedding s (student) and target embedding t (teacher) of
two views, and their temperatures T_s and T_t, the loss is the batch mean of

    -sum_j p_j log r_j,    p = softmax_j(t.m_j / T_t),    r = softmax_j(s.m_j / T_s).

The gradient reaches the online network only. The target network is a moving average of it. The
student reads an aggressive view. The teacher reads a weak one and has the lower temperature, so its
distribution is the sharper one.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from rsa_fast.methods.method import (
    EIGHT_GPUS,
    PAIRS,
    QUEUE_FIELDS,
    Loss,
    Now,
    QueueMethod,
    QueueRecipe,
    unit,
)
from rsa_fast.networks import Encoder
from rsa_fast.pipelines.views import Batch
from rsa_fast.sourced import Rows, cite


class ReSslRecipe(QueueRecipe):
    """`temperature` is the student's."""

    hidden_dim: int = Field(ge=1)  # units of the head's hidden layer
    teacher_temperature: float = Field(gt=0)  # divides the teacher's similarities


class ReSsl(QueueMethod):
    """ReSSL, which has one direction and no predictor."""

    recipe_type = ReSslRecipe
    # RSA's authors did not train ReSSL, so no row takes its optimiser from PAPER 4.1. ReSSL's code
    # for small datasets is an archive outside its repository. We read copies of it only.
    rows: ClassVar[Rows] = {
        "all": QUEUE_FIELDS
        | cite("ReSSL 3", temperature=0.1, teacher_temperature=0.04)
        | cite(
            "ReSSL's code for small datasets (its issues 5 and 7)",
            tau_base=0.99,
            out_dim=128,
            hidden_dim=2048,
            queue_size=4096,
            base_lr=0.06,
            lr_per="step",
            warmup_epochs=5,
            bn="split:8",
        )
        | cite(
            "ReSSL's code for small datasets (its issues 5 and 7): on all parameters",
            weight_decay=5e-4,
            decay_exclude="none",
        ),
        "64px": cite("chosen: third-party ports (sslic)", tau_base=0.996, queue_size=16_384),
        "224px": cite(
            "ReSSL ressl.py",
            tau_base=0.999,
            out_dim=512,
            hidden_dim=4096,
            optimizer="sgd",
            base_lr=0.05,
            lr_per="step",
            weight_decay=1e-4,
            warmup_epochs=5,
            batch_size=256,
        )
        | cite(
            "ReSSL ressl.py: chosen by the parameters' names, so the BatchNorms of downsample "
            "decay",
            decay_exclude="norm_and_bias",
        )
        | EIGHT_GPUS,
        "imagenet100": cite("chosen: half of ImageNet-1K's", queue_size=65_536),
        "imagenet1k": cite("ReSSL ressl.py", queue_size=131_072),
    }
    reads = frozenset(PAIRS["AW"])

    def __init__(self, recipe: ReSslRecipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder, recipe.hidden_dim)
        self.teacher_temperature = recipe.teacher_temperature

    def forward(self, batch: Batch, now: Now) -> Loss:
        """The loss against the current queue. Then the teacher's embeddings enter the queue."""
        teacher, all_teachers = self.keys(batch.weak_2)  # (B, D), (N, D)
        student = unit(self.online(batch.aggressive_1))  # (B, D)
        loss = relational(
            student=student,
            teacher=teacher,
            queue=self.queue.clone(),  # (D, K); `enqueue` changes it in place
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
        )
        self.enqueue(all_teachers)
        return Loss(loss, student, {})


def relational(
    student: Tensor, teacher: Tensor, queue: Tensor, temperature: float, teacher_temperature: float
) -> Tensor:
    """The batch mean of the cross-entropy of the student's relations against the teacher's.

    Takes unit rows `student` and `teacher`, `(B, D)`, and `queue`, `(D, K)`, and returns a scalar.
    """
    with torch.autocast(student.device.type, enabled=False):
        target = torch.softmax(teacher @ queue / teacher_temperature, 1)  # (B, K)
        log_relations = torch.log_softmax(student @ queue / temperature, 1)  # (B, K)
        return -(target * log_relations).sum(1).mean()  # (B, K) -> (B,) -> ()
