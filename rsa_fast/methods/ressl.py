"""ReSSL (Zheng et al. 2021; github.com/KyleZheng1997/ReSSL): the student's similarities to a queue of past embeddings match
the teacher's, which sees a weak view and is the sharper of the two."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pipelines.views import Batch
from rsa_fast.methods.method import QUEUE_START, Loss, Now, QueueMethod, QueueRecipe, unit
from rsa_fast.networks import Encoder
from rsa_fast.sourced import Rows, cite


class ReSslRecipe(QueueRecipe):
    hidden_dim: int = Field(ge=1)  # of the head
    teacher_temperature: float = Field(gt=0)


class ReSsl(QueueMethod):
    """`temperature` is the student's, `teacher_temperature` the teacher's; no predictor, one direction."""

    recipe_type = ReSslRecipe
    # The official settings for small datasets are not public. These are what ports agree on.
    rows: ClassVar[Rows] = {
        "all": QUEUE_START
        | cite("ReSSL 3", temperature=0.1, teacher_temperature=0.04)
        | cite(
            "chosen: third-party ports (sslic)",
            tau_base=0.99,
            out_dim=128,
            hidden_dim=2048,
            queue_size=4096,
        )
        | cite("ReSSL's CIFAR scripts in solo-learn", base_lr=0.05),
        "64px": cite("chosen: third-party ports (sslic)", tau_base=0.996, queue_size=16_384),
        "224px": cite("ReSSL ressl.py", tau_base=0.999, out_dim=512, hidden_dim=4096, bn="local")
        | cite(
            "ReSSL ressl.py", optimizer="sgd", weight_decay=1e-4, warmup_epochs=5, batch_size=256
        ),
        "imagenet100": cite("chosen: half of ImageNet-1K's", queue_size=65_536),
        "imagenet1k": cite("ReSSL ressl.py", queue_size=131_072),
    }
    reads = frozenset({"aggressive_1", "weak_2"})

    def __init__(self, recipe: ReSslRecipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder, recipe.hidden_dim)
        self.teacher_temperature = recipe.teacher_temperature

    def forward(self, batch: Batch, now: Now) -> Loss:
        """Cross-entropy of both distributions over the queue as it was; then the teacher's embeddings enter it."""
        teacher, every = self.keys(batch.weak_2)
        student = unit(self.online(batch.aggressive_1))
        loss = relational(
            student, teacher, self.queue.clone(), self.temperature, self.teacher_temperature
        )
        self.enqueue(every)
        return Loss(loss, student, {})


def relational(
    student: Tensor, teacher: Tensor, queue: Tensor, temperature: float, teacher_temperature: float
) -> Tensor:
    """Mean over the batch of -sum softmax(teacher.queue / T_t) log softmax(student.queue / T_s): rows `(B, D)`, `(D, K)`."""
    with torch.autocast(student.device.type, enabled=False):
        target = torch.softmax(teacher @ queue / teacher_temperature, 1)
        return -(target * torch.log_softmax(student @ queue / temperature, 1)).sum(1).mean()
