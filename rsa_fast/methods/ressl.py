"""ReSSL (Zheng et al. 2021; github.com/KyleZheng1997/ReSSL): the student's similarities to a queue of past embeddings match
the teacher's, which sees a weak view and is the sharper of the two."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.views import Batch
from rsa_fast import recipes
from rsa_fast.methods.method import Loss, unit
from rsa_fast.methods.moco import QueueMethod
from rsa_fast.networks import Encoder


class ReSsl(QueueMethod):
    """`temperature` is the student's, `teacher_temperature` the teacher's; no predictor, one direction."""

    reads = frozenset({"aggressive_1", "weak_2"})

    def __init__(self, recipe: recipes.ReSsl, encoder: Encoder) -> None:
        super().__init__(recipe, encoder, recipe.hidden_dim)
        self.teacher_temperature = recipe.teacher_temperature

    def forward(self, batch: Batch, beta: float) -> Loss:
        """Cross-entropy of both distributions over the queue as it was; then the teacher's embeddings enter it."""
        teacher, every = self.keys(batch.weak_2)
        student = unit(self.online(batch.aggressive_1))
        loss = relational(student, teacher, self.queue.clone(), self.temperature, self.teacher_temperature)
        self.enqueue(every)
        return Loss(loss, student, {})


def relational(student: Tensor, teacher: Tensor, queue: Tensor, temperature: float, teacher_temperature: float) -> Tensor:
    """Mean over the batch of -sum softmax(teacher.queue / T_t) log softmax(student.queue / T_s): rows `(B, D)`, `(D, K)`."""
    with torch.autocast(student.device.type, enabled=False):
        target = torch.softmax(teacher @ queue / teacher_temperature, 1)
        return -(target * torch.log_softmax(student @ queue / temperature, 1)).sum(1).mean()
