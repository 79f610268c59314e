"""Callbacks, with which a program adds to a run: early stopping, pruning or its own records.

    class Pruning(Callback):
        def on_epoch(self, run, epoch, scores):
            return epoch == 10 and scores["knn_top1"] < 30

    result = train(recipe, data, out, callbacks=[EarlyStopping(patience_epochs=20), Pruning()])

With several ranks, every rank calls its callbacks (`rsa_fast.distributed.rank()` is its number).
Their arguments are the same on all ranks, except for times and memory. If a callback of any rank
asks to stop, all ranks stop after the same step.

An error in a callback ends the run like any other error. The run can be resumed from its last
checkpoint. Callbacks are not part of a checkpoint, and they do not change the run's numbers unless
they change `run`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsa_fast.training.step import Run


class Callback:
    """Methods that are called during training. They do nothing unless a subclass replaces them.

    `run` is the state of training. `run.step` steps are done, `run.recipe` and `run.derived`
    contain the numbers, and `run.method.encoder` is the network. `on_record` and `on_epoch` may
    return True to stop. The current step is then complete, a checkpoint is written, and `train`
    returns the result, without the scores of a complete run. `resume=True` continues such a run.
    """

    def on_record(self, run: Run, record: dict[str, Any]) -> bool | None:
        """Called after each record of losses has been written, every `log_every_steps` steps.

        `record` is that line of metrics.jsonl: `step`, `loss`, `embedding_std`, `lr`,
        `images_per_s` and so on.
        """

    def on_epoch(self, run: Run, epoch: int, scores: dict[str, Any]) -> bool | None:
        """Called after each epoch. `epoch` is the number of complete epochs.

        `scores` are the scores of the encoder after this epoch, such as `knn_top1`. After the last
        epoch they include `linear_top1`. They are empty if the epoch was not scored (see
        `knn_every_epochs`). A run that is resumed after an epoch calls this again for the same
        epoch.
        """

    def on_end(self, run: Run, result: dict[str, Any]) -> None:
        """Called with the content of `result.json` after it is written, even for a stopped run."""


class EarlyStopping(Callback):
    """Stops a run as soon as its best score is `patience_epochs` epochs old.

    `score` is the name of a score that is measured during training, every `knn_every_epochs`
    epochs. Higher is better. If the recipe's `keep_best` has the same name, the checkpoint of the
    best epoch is saved as `checkpoints/best.pt`. A resumed run counts its patience from the epoch
    where it starts. Raises ValueError after the first scored epoch if there is no such score.
    """

    def __init__(self, score: str = "knn_top1", patience_epochs: int = 20) -> None:
        self.score, self.patience_epochs = score, patience_epochs
        self.best, self.best_epoch = float("-inf"), -1

    def on_epoch(self, run: Run, epoch: int, scores: dict[str, Any]) -> bool:
        if self.best_epoch < 0:
            self.best_epoch = epoch - 1  # the run starts or is resumed here
        if scores and self.score not in scores:
            raise ValueError(f"no score {self.score}: choose from {', '.join(scores)}")
        if scores and scores[self.score] > self.best:
            self.best, self.best_epoch = scores[self.score], epoch
        return epoch >= self.best_epoch + self.patience_epochs
