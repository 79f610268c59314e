"""What a program adds to a run: early stopping, pruning, records of its own.

    class Pruning(Callback):
        def on_epoch(self, run, epoch, scores):
            return epoch == 10 and scores["knn_top1"] < 30

    result = train(recipe, data, out, callbacks=[EarlyStopping(patience_epochs=20), Pruning()])

With several ranks, every rank calls its callbacks (`rsa_fast.distributed.rank()` is its number).
What they get is the same on all ranks, except for times and memory. If a callback of any rank asks
to stop, all ranks stop after the same step.

An error in a callback ends the run like any other error. The run can be resumed from its last
checkpoint. Callbacks are not part of a checkpoint, and they do not change the run's numbers unless
they change `run`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsa_fast.training.step import Run


class Callback:
    """Methods that are called during training. Each does nothing; a subclass replaces some.

    `run` is the state of training: `run.step` steps are done, `run.recipe` and `run.derived`
    contain the numbers, `run.method.encoder` is the network. `on_record` and `on_epoch` may return
    True to stop. The current step is then complete, a checkpoint is written, and `train` returns
    the result, without the scores of a complete run. `resume=True` continues such a run.
    """

    def on_record(self, run: Run, record: dict[str, Any]) -> bool | None:
        """Called after each record of losses was written, every `log_every_steps` steps.

        `record` is that line of metrics.jsonl: `step`, `loss`, `embedding_std`, `lr`,
        `images_per_s` and so on.
        """

    def on_epoch(self, run: Run, epoch: int, scores: dict[str, Any]) -> bool | None:
        """Called after each epoch, of which `epoch` are complete.

        `scores` are those of the encoder after this epoch: `knn_top1` and others, and after the
        last epoch also `linear_top1`. They are empty if the epoch was not scored (see
        `knn_every_epochs`). A run that is resumed after an epoch calls this for it again.
        """

    def on_end(self, run: Run, result: dict[str, Any]) -> None:
        """Called once `result.json` is written, with its content, also if the run was stopped."""


class EarlyStopping(Callback):
    """Stops a run as soon as its best score is `patience_epochs` epochs old.

    `score` is the name of a score that is measured during training, every `knn_every_epochs`
    epochs; higher is better. With the recipe's `keep_best` of the same name, the checkpoint of the
    best epoch is kept as `checkpoints/best.pt`. A run that is resumed counts its patience from
    there. Raises ValueError after the first scored epoch if there is no such score.
    """

    def __init__(self, score: str = "knn_top1", patience_epochs: int = 20) -> None:
        self.score, self.patience_epochs = score, patience_epochs
        self.best, self.best_epoch = float("-inf"), -1

    def on_epoch(self, run: Run, epoch: int, scores: dict[str, Any]) -> bool:
        if self.best_epoch < 0:
            self.best_epoch = epoch - 1  # the run starts, or goes on, here
        if scores and self.score not in scores:
            raise ValueError(f"no score {self.score}: choose from {', '.join(scores)}")
        if scores and scores[self.score] > self.best:
            self.best, self.best_epoch = scores[self.score], epoch
        return epoch >= self.best_epoch + self.patience_epochs
