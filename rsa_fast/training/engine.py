"""Training: the loop over steps, with its records, checkpoints and evaluations.

    result = train(build_recipe("cifar10", "rsa"), data=Path("data/cifar10"), out=Path("runs/b"))

`train` prepares a run and `Loop.run_until` is the loop. What a step does is in `step.train_on`.
The step number is the only state of the data: the sample order and all augmentations are functions
of it. That is why a run that is stopped and resumed equals an uninterrupted one bit for bit.
"""

from __future__ import annotations

import json
import logging
import shlex
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rsa_fast.datasets import OWN_STEPS
from rsa_fast.distributed import (
    Heartbeat,
    barrier,
    handled_signals,
    max_over_ranks,
    process_group,
    rank,
    restarted,
    world_size,
)
from rsa_fast.evaluation.evaluate import Evaluation, NoLabelsError
from rsa_fast.evaluation.feature_stats import feature_stats
from rsa_fast.methods import short_name
from rsa_fast.networks import check_arch
from rsa_fast.pipelines import Loader, Source, open_views
from rsa_fast.pipelines.files import json_text, write_text
from rsa_fast.pipelines.layouts import Data, has_test_split, inventory, places_of
from rsa_fast.recipes import FREE_FIELDS, Recipe, dump_yaml, recipe_of_own_encoder, stored_recipe
from rsa_fast.training import checkpoint
from rsa_fast.training.callbacks import Callback
from rsa_fast.training.meter import Meter, warn_of_collapse
from rsa_fast.training.metrics import Metrics, check_wandb, read_metrics, versions_and_hardware
from rsa_fast.training.run_folder import (
    add_start,
    explain_full_disk,
    hold_folder,
    launcher_job_id,
    prepare_folder,
    started_by_this_job,
    stored_threads,
    this_process,
    try_to_report,
)
from rsa_fast.training.start import first_difference, take_weights
from rsa_fast.training.step import Run, build_run, choose_device, choose_dtype, train_on

log = logging.getLogger("rsa_fast")

FEW_IMAGES = OWN_STEPS[0][0]  # up to this number, `auto` chooses its shortest budget
ADAM_PEAK_LR = 0.01  # chosen: Adam and AdamW rarely train at a higher rate

# A limit for `Extents.sorted_by`. It is our choice: 40 shuffled images are below it, and sorted
# images are above it.
STORED_BY_CLASS = 0.3

# This number tells the other ranks that a callback asked to stop. A signal is sent as this number
# plus the signal's own.
CALLBACK_STOP = 1


class StoppedError(Exception):
    """A signal stopped the run, after its checkpoint was written."""

    @classmethod
    def after(cls, received: signal.Signals, step: int) -> StoppedError:
        return cls(
            f"{received.name}: stopped after step {step}, which is saved; continue with --resume"
        )


def train(
    recipe: Recipe,
    data: Data,
    out: str | Path,
    *,
    resume: bool = False,
    resume_from: str | Path | None = None,
    overwrite: bool = False,
    init_from: str | Path | None = None,
    key: str | None = None,
    force: bool = False,
    stop_at_step: int | None = None,
    encoder: nn.Module | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any] | None:
    """Train a recipe on the images in `data`, with the run folder `out`.

    `data` is a folder, a text file of paths, or several of them (see `pipelines.layouts`).

    Returns the result on rank 0, which also writes it to `result.json`, and None on all other
    ranks. Under torchrun every rank calls this function. A run that torchrun restarts because a
    rank died is resumed.

    Args:
        resume: Continue from the newest undamaged checkpoint in `out`, bit for bit as if the run
            had never stopped. If there is no checkpoint yet, start at step 0. A recipe with more
            epochs lengthens the run. If the run is finished, the stored result is returned and
            nothing is changed.
        resume_from: Continue from this checkpoint instead of the newest. It is the name of a
            checkpoint in `out`, whose later checkpoints are then deleted. If `out` has no
            checkpoints, it can also be the path of a checkpoint of another run.
        overwrite: Delete the run in `out`, but only when the new run is ready to start.
        init_from: The run starts from the encoder in this file, of this project or another (see
            `load_encoder`). The heads are also loaded if the file is a checkpoint of a run of the
            same method whose networks have the same shapes.
        key: The network in `init_from` if it has several, such as `teacher` (see `load_encoder`).
        force: Resume although the recipe or the data changed. The differences are logged.
        stop_at_step: Write a checkpoint after this many steps and return.
        encoder: A module with the attribute `feature_dim`. A copy of it is trained instead of the
            network that the recipe names. A resumed run needs the same module again.
        callbacks: They are called after records and epochs, and at the end (see `Callback`).

    Raises:
        BlockingIOError: Another process trains in `out`.
        FileExistsError: `out` is not empty, and neither `resume` nor `overwrite` is given.
        ValueError: The recipe or the data of a resumed run changed.
        FloatingPointError: The loss or a weight is not finite.
        OSError: A checkpoint cannot be written.
        GpuMemoryError: The GPU has too little memory. The message says what helps.
        ConnectionError: A rank stopped answering.
        StoppedError: A signal stopped the run.
    """
    out, init_from = Path(out), Path(init_from) if init_from else None
    chosen = chosen_checkpoint(Path(resume_from), out) if resume_from else None
    if unfit := [callback for callback in callbacks if not isinstance(callback, Callback)]:
        raise ValueError(f"callbacks must be instances of rsa_fast.Callback, found {unfit[0]!r}")
    if encoder is not None:
        recipe = recipe_of_own_encoder(recipe)
    check_arch(recipe, encoder)
    if recipe.wandb:
        check_wandb()
    with (
        ExitStack() as afterwards,
        process_group(
            recipe.device, recipe.timeout_s, stored_threads(out) if resume else None
        ) as heartbeat,
        explain_full_disk(out),
        explain_out_of_memory(recipe, encoder),
        ExitStack() as folder_lock,
    ):
        recipe.check_batch(world_size())
        # ---- The run folder ----------------------------------------------------------------------
        # Rank 0 refuses an unsuitable folder before any image is read. It locks a suitable one
        # until the run ends. When torchrun restarts the ranks, the folder already contains this
        # same run, which is then resumed.
        if restarted() and started_by_this_job(out):
            resume, overwrite = True, False
            if rank() == 0:
                log.warning("a process of this run ended: all its processes were restarted")
            # The restarted run continues from its own newest checkpoint, if it wrote one.
            chosen = None if checkpoint.paths_in(out / "checkpoints") else chosen
        resume = resume or chosen is not None
        if resume and not chosen and (stored := finished_result(recipe, out)):
            if rank() == 0:
                log.info(
                    f"the run in {out} finished after step {stored['step']:,}: nothing is changed, "
                    "and the stored result is returned (more epochs lengthen the run)"
                )
            return stored if rank() == 0 else None
        if rank() == 0:
            folder_lock.enter_context(hold_folder(out, resume, overwrite))
        barrier()

        # ---- The data and the networks -----------------------------------------------------------
        # The networks start from random parameters, from a checkpoint or from given weights.
        source = recipe.training_source(data, cache=out)
        recipe.check_labels(source.manifest.labelled, len(source.manifest.classes))
        run = build_run(recipe, len(source.manifest), encoder)
        fingerprint = source.manifest.fingerprint
        load_start(
            run,
            out,
            fingerprint,
            resume=resume,
            chosen=chosen,
            init_from=init_from,
            key=key,
            force=force,
        )
        evaluation = open_evaluation(data, recipe, run, out)
        if recipe.keep_best and evaluation is None:
            raise ValueError(
                f"keep_best = {recipe.keep_best}, but this run has no scores: leave it out"
            )
        if rank() == 0:
            announce(run, source, evaluation, out, init_from)

        # ---- The loop ----------------------------------------------------------------------------
        # It trains to the last step of the recipe, to `stop_at_step`, or until a signal or a
        # callback asks to stop.
        result = run_loop(
            run,
            source,
            evaluation,
            out,
            places=[str(place.absolute()) for place in places_of(data)],
            heartbeat=heartbeat,
            resume=resume,
            starts_again=chosen is not None,
            overwrite=overwrite,
            end=min(stop_at_step or run.derived.total_steps, run.derived.total_steps),
            callbacks=callbacks,
        )
        # A run that was stopped has no time for the report. Rank 0 draws it after the process group
        # has ended. While the group exists, reading the images would wait for the other ranks.
        if rank() == 0 and run.step == run.derived.total_steps:
            afterwards.callback(try_to_report, out)
        return result if rank() == 0 else None


def run_loop(
    run: Run,
    source: Source,
    evaluation: Evaluation | None,
    out: Path,
    *,
    places: list[str],
    heartbeat: Heartbeat,
    resume: bool,
    starts_again: bool,
    overwrite: bool,
    end: int,
    callbacks: Sequence[Callback],
) -> dict[str, Any]:
    """Open the loop's inputs and outputs, and train up to step `end`. Returns the result.

    `places` are the absolute paths of the data, which `env.json` records. With `starts_again`, the
    checkpoints after the current step are deleted.

    Raises StoppedError if a signal stopped the run before its last step.
    """
    recipe, total_steps = run.recipe, run.derived.total_steps
    order = recipe.order_of(source, rank=rank(), world_size=world_size())
    with (
        open_views(
            source,
            recipe.views,
            run.method.reads,
            order,
            device=run.device,
            dtype=run.dtype,
            loading=recipe.loading,
        ) as loader,
        stop_signals() as signals_received,
    ):
        # After this barrier every rank is able to start. Only now may an old run be deleted.
        barrier()
        if rank() == 0:
            prepare_folder(out, resume, overwrite)
            if starts_again:
                checkpoint.delete_later(out / "checkpoints", run.step)
            start = {
                "job": launcher_job_id(),
                "data": places,
                "images": len(source.manifest),
                "classes": len(source.manifest.classes),
                "steps_per_epoch": run.derived.steps_per_epoch,
                "step": run.step,
                "total_steps": total_steps,
            }
            add_start(out, this_process() | versions_and_hardware() | start)
            write_text(out / "recipe.yaml", dump_yaml(recipe))

        # Leaving this block waits for the checkpoint that is being written.
        with (
            Metrics(out, total_steps, run.step, recipe.wandb, recipe.epochs) as metrics,
            open_writer(out, recipe) as writer,
        ):
            loop = Loop(
                run=run,
                loader=loader,
                metrics=metrics,
                evaluation=evaluation,
                writer=writer,
                out=out,
                fingerprint=source.manifest.fingerprint,
                classes=source.manifest.classes,
                signals_received=signals_received,
                heartbeat=heartbeat,
                callbacks=callbacks,
            )
            if recipe.keep_best:
                loop.best, loop.best_step = checkpoint.best_score(
                    out / "checkpoints", recipe.keep_best, run.step
                )
            result = loop.run_until(end)

    if signals_received and run.step < total_steps:
        raise StoppedError.after(signals_received[0], run.step)
    return result


@dataclass
class Loop:
    """The loop over steps, with the records, checkpoints and evaluations between them."""

    run: Run
    loader: Loader
    metrics: Metrics
    evaluation: Evaluation | None  # None if the data cannot be evaluated
    writer: checkpoint.Writer | None  # None on all ranks but rank 0
    out: Path
    fingerprint: str  # of the training images
    classes: tuple[str, ...]  # the names of their labels; empty without labels
    signals_received: list[signal.Signals]  # filled by `stop_signals`
    heartbeat: Heartbeat
    callbacks: Sequence[Callback]
    best: float = float("-inf")  # the best score `keep_best` up to now, and its step
    best_step: int = 0
    callback_stops: bool = False  # whether a callback asked to stop

    def run_until(self, end: int) -> dict[str, Any]:
        """Train up to step `end`, or until a signal or a callback asks to stop.

        Returns the result.
        """
        run, recipe, steps_per_epoch = self.run, self.run.recipe, self.run.derived.steps_per_epoch
        meter = Meter(recipe.batch_size, run.device)

        # Each turn of this loop is one epoch. The first one may start in the middle of an epoch,
        # and the last one may end there.
        while run.step < end:
            # The encoder is scored before each epoch. A run that is resumed within an epoch skips
            # this.
            epoch, first_step = divmod(run.step, steps_per_epoch)
            if first_step == 0:
                scores = self.score_knn(epoch)
                self.keep_best(meter, scores)
                if epoch > 0 and self.stops_after_epoch(epoch, scores):
                    if epoch % recipe.checkpoint_every_epochs:
                        self.save(meter)
                    break

            # Train the steps of the epoch, each on `accumulate` batches. A step only queues work on
            # the device. The loop waits for the device when a record is due, every
            # `log_every_steps` steps. The heartbeat tells the other ranks what this rank is doing.
            first_batch = first_step * recipe.accumulate
            meter.restart()
            self.heartbeat.doing = f"waiting for the views of step {run.step}"
            for batch in meter.waiting(self.loader.batches(epoch, first_batch)):
                self.heartbeat.doing = f"in step {run.step}"
                loss = train_on(run, batch)
                if loss is None:  # the step continues with the next batch
                    continue
                meter.add(run.step - 1, loss, run.skipped)
                record_due = run.step % recipe.log_every_steps == 0
                if record_due:
                    self.record(meter)
                if self.stop_requested(record_due):
                    end = run.step
                if run.step == end:
                    if not record_due:
                        self.record(meter)
                    break
                self.heartbeat.doing = f"waiting for the views of step {run.step}"

            # After a complete epoch, statistics of the features of its last batch are recorded.
            # This comes before the checkpoint, because a run resumed from the checkpoint does not
            # return here. Its record would be missing.
            epochs_done = run.step // steps_per_epoch
            if run.step % steps_per_epoch == 0 and rank() == 0:
                stats = feature_stats(run.method.encoder, batch)
                self.metrics.write({"step": run.step, "epoch": epochs_done, **stats})

            # A checkpoint is also written wherever training ends.
            if run.step == end or epochs_done % recipe.checkpoint_every_epochs == 0:
                self.save(meter)

        return self.finish(meter)

    def finish(self, meter: Meter) -> dict[str, Any]:
        """Evaluate the encoder if training is complete, and write and return the result."""
        run, recipe = self.run, self.run.recipe
        complete = run.step == run.derived.total_steps
        if self.writer and not meter.reads:
            # All steps were trained before this start, so the result is computed from their
            # records.
            meter.reads = [record for record in read_metrics(self.out) if "step_ms" in record]
            if meter.reads:
                meter.embedding_std = meter.reads[-1]["embedding_std"]
        scores: dict[str, Any] = {}
        if self.evaluation and complete:
            scores = self.final_scores(self.evaluation)
            self.metrics.write({"step": run.step, "epoch": recipe.epochs, **scores})
            self.keep_best(meter, scores)
        if complete:
            self.ask(callback.on_epoch(run, recipe.epochs, scores) for callback in self.callbacks)

        result = {
            "out": str(self.out),
            "method": short_name(recipe.method),
            "dataset": recipe.data_name,
            "step": run.step,
            **meter.summary(),
            "knn_top1": None,
            "knn20_top1": None,
            "linear_top1": None,
            **scores,
        }
        if self.best_step:
            result |= {f"best_{recipe.keep_best}": self.best, "best_step": self.best_step}
        if scores and self.evaluation and self.evaluation.predictions:
            result |= self.evaluation.per_class()
            if self.writer:
                self.evaluation.write_confusion(self.out / "confusion.json")
        if self.writer:
            if complete:
                result |= run.method.summary(read_metrics(self.out))
            # The result is written last: when it exists, the checkpoint of its step exists too.
            self.writer.wait()
            write_text(self.out / "result.json", json_text(result))
        for callback in self.callbacks:
            callback.on_end(run, result)
        return result

    def final_scores(self, evaluation: Evaluation) -> dict[str, Any]:
        """The scores of the trained encoder, or none, with a message, if the evaluation fails."""
        try:
            return self.evaluate(evaluation, "knn", "linear-fast")
        except (RuntimeError, MemoryError, OSError) as error:
            # The training is complete, so its result is written without scores.
            path = self.out / "checkpoints" / checkpoint.PATTERN.format(self.run.step)
            words = ["--checkpoint", str(path)]  # the checkpoint's run records where the images are
            commands = [
                shlex.join(["rsa-fast", "eval", protocol, *words]) for protocol in ("knn", "linear")
            ]
            reason = str(error).partition("\n")[0]
            if rank() == 0:
                log.error(
                    f"the run is complete, but its evaluation failed: {reason}\n"
                    "The result is written without scores. To score the encoder:\n"
                    + "\n".join(commands)
                )
            return {}

    def record(self, meter: Meter) -> None:
        """Write the means since the last record. Waits for the device.

        Raises FloatingPointError if the loss is not finite.
        """
        values, schedule = meter.read(), self.run.schedule(self.run.step - 1)
        schedule.pop("step", None)  # methods count it from 0, and records from 1
        record = {"step": self.run.step, **values, **schedule}
        self.check_losses(meter)
        self.metrics.write(record)
        warn_of_collapse(record)
        self.ask(callback.on_record(self.run, record) for callback in self.callbacks)

    def ask(self, answers: Iterable[bool | None]) -> None:
        """Call the callbacks, and remember whether one of them asks to stop."""
        self.heartbeat.doing = "in a callback"
        self.callback_stops |= True in list(answers)

    def keep_best(self, meter: Meter, scores: dict[str, Any]) -> None:
        """Write `best.pt` if the current encoder has the best scores up to now.

        The scores before the first step do not count. Raises ValueError if no score is called
        `keep_best`.
        """
        name = self.run.recipe.keep_best
        if not (name and scores):
            return
        if name not in scores:
            names = [key for key in scores if key.endswith(("_top1", "_top5"))]
            raise ValueError(f"keep_best = {name} is not a score: choose from {', '.join(names)}")
        better = rank() == 0 and self.run.step > 0 and scores[name] > self.best
        if max_over_ranks(int(better)):
            self.best, self.best_step = scores[name], self.run.step
            self.save(meter, score={name: self.best})

    def save(self, meter: Meter, score: dict[str, float] | None = None) -> None:
        """Write a checkpoint, or `best.pt` with its `score`. Waits for the device.

        Raises FloatingPointError if the loss, a weight or a statistic is not finite. A checkpoint
        with such a value is never written.
        """
        self.heartbeat.doing = "writing a checkpoint"
        meter.update_faults()
        self.check_losses(meter)
        state = self.run.method.state_dict()
        finite = torch.stack([x.isfinite().all() for x in state.values()]).all()
        if max_over_ranks(int(~finite)):
            step = self.run.step - 1
            fault = f"the weights or statistics after step {step} are not finite"
            self.stop_at_fault(step, fault)
        if self.writer:
            state = checkpoint_state(self.run, self.fingerprint, self.classes)
            if score:
                self.writer.save(state | {"score": score}, checkpoint.BEST)
            else:
                self.writer.save(state)

    def check_losses(self, meter: Meter) -> None:
        """Raise FloatingPointError if a loss was not finite.

        In fp16, single overflows are normal, and the scaler skips such steps. Training then stops
        only after `max_skips` skipped steps in a row.
        """
        if self.run.scaler.is_enabled():
            skips, step = meter.worst_skips, meter.worst_step
            if skips >= self.run.recipe.max_skips:
                fault = f"fp16 overflowed in {skips} steps in a row, up to step {step}"
                self.stop_at_fault(step, fault)
        elif meter.first_bad is not None:
            self.stop_at_fault(meter.first_bad, f"the loss of step {meter.first_bad} is not finite")

    def stop_at_fault(self, step: int, fault: str) -> None:
        """Write `nonfinite.json`, which lists the sample ids of the batch of `step`.

        Always raises FloatingPointError.
        """
        if self.writer:
            self.writer.wait()
        # All ranks together read the same sample ids as a single rank would read.
        order = replace(self.loader.job.order, rank=0, world_size=1, accumulate=1)
        epoch, step_of_epoch = divmod(step, len(order))
        checkpoints = checkpoint.paths_in(self.out / "checkpoints")
        last_good = str(checkpoints[-1]) if checkpoints else None
        report_path = self.out / "nonfinite.json"
        if rank() == 0:
            report = {
                "step": step,
                "epoch": epoch,
                "fault": fault,
                "checkpoint": last_good,
                "sample_ids": order.ids(epoch, step_of_epoch).tolist(),
            }
            write_text(report_path, json_text(report))
        raise FloatingPointError(
            f"{fault}: lower the learning rate or add warm-up epochs. "
            f"Last good checkpoint: {last_good}; the batch's sample ids: {report_path}"
        )

    def stop_requested(self, record_due: bool) -> bool:
        """Whether a signal or a callback asked any rank to stop.

        All ranks get the same answer at the same step.

        Several ranks have to communicate for this. On CPUs they do so in every step, which takes
        0.2 ms. On GPUs they do so only when a record is due, which waits for the device anyway.
        """
        if world_size() > 1 and not (record_due or self.run.device.type == "cpu"):
            return False
        number = CALLBACK_STOP if self.callback_stops else 0
        if self.signals_received:
            number = CALLBACK_STOP + self.signals_received[0]
        number = max_over_ranks(number)
        if number > CALLBACK_STOP:
            self.signals_received.append(signal.Signals(number - CALLBACK_STOP))
        elif number and rank() == 0:
            log.info(f"a callback asked to stop: the run ends after step {self.run.step}")
        return bool(number)

    def stops_after_epoch(self, epoch: int, scores: dict[str, Any]) -> bool:
        """Call the callbacks for a complete epoch. Returns whether the run has to stop."""
        self.ask(callback.on_epoch(self.run, epoch, scores) for callback in self.callbacks)
        return self.stop_requested(record_due=True)

    def score_knn(self, epoch: int) -> dict[str, Any]:
        """Record and return the kNN accuracy of the encoder, every `knn_every_epochs` epochs.

        After other epochs, the result is empty.
        """
        every = self.run.recipe.knn_every_epochs
        if not (self.evaluation and every and epoch % every == 0):
            return {}
        scores = self.evaluate(self.evaluation, "knn")
        self.metrics.write({"step": self.run.step, "epoch": epoch, **scores})
        return scores

    def evaluate(self, evaluation: Evaluation, *protocols: str) -> dict[str, Any]:
        """The scores of the encoder by the given protocols.

        With bn = local every rank has its own running statistics. All ranks evaluate with those of
        rank 0, because these are the ones in the checkpoint.
        """
        self.heartbeat.doing = "evaluating"
        if world_size() > 1:
            for buffer in self.run.method.encoder.buffers():
                dist.broadcast(buffer, 0)
        return self.run.method.score(evaluation, protocols)


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Yield a list to which every signal that asks to stop is appended.

    The current step can thus be completed and saved. A second signal of the same kind takes effect
    at once. SIGHUP is an exception, because both the shell and the kernel send it when a terminal
    closes.
    """
    signals_received: list[signal.Signals] = []

    # Python permits signal handlers in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield signals_received
        return

    def receive(number: int, _: Any) -> None:
        signals_received.append(signal.Signals(number))
        log.warning(f"{signals_received[0].name}: finishing the step, then saving")
        if number != signal.SIGHUP:
            signal.signal(number, previous[number])

    previous = {int(number): signal.getsignal(number) for number in handled_signals()}
    for number in previous:
        signal.signal(number, receive)
    try:
        yield signals_received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class GpuMemoryError(MemoryError, ValueError):
    """The GPU has too little memory. The message says what helps.

    It is a ValueError, so the command line reports it without a traceback.
    """


@contextmanager
def explain_out_of_memory(recipe: Recipe, encoder: nn.Module | None) -> Iterator[None]:
    """Turn torch's error about device memory into a GpuMemoryError with the planner's advice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        # Imported here, because only this rare case needs it.
        from rsa_fast.insight.planning import memory_advice

        device = choose_device(recipe.device)
        gib = None
        if device.type == "cuda":
            gib = torch.cuda.get_device_properties(device).total_memory / 2**30
        dtype = choose_dtype(recipe.precision, device)
        asked = ". ".join(str(error).split(". ")[:3])  # the rest is about the allocator
        advice = memory_advice(recipe, dtype, world_size(), gib, encoder)
        raise GpuMemoryError(f"{asked}.\n{advice}") from error


def open_writer(out: Path, recipe: Recipe) -> AbstractContextManager[checkpoint.Writer | None]:
    """The writer of checkpoints on rank 0, and None on the other ranks."""
    if rank() > 0:
        return nullcontext()
    return checkpoint.Writer(out / "checkpoints", recipe.keep_last)


def finished_result(recipe: Recipe, out: Path) -> dict[str, Any] | None:
    """The stored result if the run in `out` has this recipe and has trained all of its epochs.

    Rank 0 reads the folder. Every rank has to call this and gets the same answer.
    """
    answer: list[dict[str, Any] | None] = [None]
    paths = checkpoint.paths_in(out / "checkpoints")
    # If a file is missing or damaged, the run continues from the files that exist.
    with suppress(OSError, ValueError, KeyError):
        if rank() == 0 and paths:
            result = json.loads((out / "result.json").read_text())
            complete = {"epoch": recipe.epochs, "step": result["step"]}
            if any(complete.items() <= record.items() for record in read_metrics(out)):
                state = checkpoint.load(paths[-1])
                if state["step"] == result["step"] and not changes(recipe, state["recipe"]):
                    answer = [result]
    if world_size() > 1:
        dist.broadcast_object_list(answer)
    return answer[0]


def changes(recipe: Recipe, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields whose values differ in a checkpoint's recipe (first) and this run's (second).

    Those in `FREE_FIELDS` do not count.
    """
    now = recipe.model_dump(mode="json")
    # Another method's fields are not changed, because this run may not be able to load its file.
    with suppress(ValueError):
        if saved["method"] == now["method"]:
            origin = "the checkpoint" if rank() == 0 else None
            saved = stored_recipe(saved, origin).model_dump(mode="json")
    return {
        key: (saved.get(key), now.get(key))
        for key in now | saved
        if key not in FREE_FIELDS and now.get(key) != saved.get(key)
    }


def load_start(
    run: Run,
    out: Path,
    fingerprint: str,
    *,
    resume: bool,
    chosen: Path | None,
    init_from: Path | None,
    key: str | None,
    force: bool,
) -> None:
    """Load the checkpoint to resume from, or else the weights in `init_from`, if there are any.

    The checkpoint is `chosen` or, without it, the newest in `out`.

    Raises FileNotFoundError if the ranks did not load the same checkpoint, and ValueError for
    weights that do not fit.
    """
    folder = out / "checkpoints"
    if chosen:
        restore(run, checkpoint.load(chosen), fingerprint, force)
    elif resume and checkpoint.paths_in(folder):
        restore(run, checkpoint.load_latest(folder), fingerprint, force)
    elif init_from:
        taken = take_weights(run.method, run.recipe, init_from, key)
        if rank() == 0:
            log.info(taken)
    # On a network disk, a new file may become visible later on some machines than on others.
    latest_step = max_over_ranks(run.step)
    if latest_step != run.step:
        raise FileNotFoundError(
            f"{out}: rank {rank()} found the checkpoint of step {run.step}, and another rank that "
            f"of step {latest_step}; start again when all machines see the same files"
        )
    if resume and run.step == 0 and rank() == 0:
        log.info(f"{out} has no checkpoint yet: starting at step 0")


def chosen_checkpoint(path: Path, out: Path) -> Path:
    """The checkpoint at `path`, or the one of the run in `out` that has this name.

    Raises FileNotFoundError if there is none. Raises ValueError for a checkpoint of another run if
    `out` has its own checkpoints.
    """
    folder = out / "checkpoints"
    chosen = path if path.is_file() else folder / path.name
    if not chosen.is_file():
        names = [path.name for path in [*checkpoint.paths_in(folder), *folder.glob("best.pt")]]
        raise FileNotFoundError(f"no checkpoint {path}; in {folder}: {', '.join(names) or 'none'}")
    if chosen.resolve().parent != folder.resolve() and checkpoint.paths_in(folder):
        raise ValueError(
            f"{chosen} belongs to another run than the one in {out}: choose a new --out for a run "
            "that starts from it"
        )
    return chosen


def checkpoint_state(run: Run, fingerprint: str, classes: tuple[str, ...] = ()) -> dict[str, Any]:
    """The content of a checkpoint.

    `fingerprint` identifies the training images, and `classes` are the names of their labels.
    """
    return {
        "step": run.step,
        "recipe": run.recipe.model_dump(mode="json"),
        "data": fingerprint,
        "classes": list(classes),
        "method": run.method.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "dtype": checkpoint.name_of(run.dtype),
        "world_size": world_size(),
    }


def restore(run: Run, state: dict[str, Any], fingerprint: str, force: bool = False) -> None:
    """Load the content of a checkpoint into a new run.

    Raises ValueError with the differences if the recipe or the training images are not the same.
    With `force` the differences are only logged. Networks or an optimiser state with other shapes
    are always a ValueError. Fields in `FREE_FIELDS` may always differ. The run may have more
    epochs, but fewer epochs than the checkpoint has trained are always a ValueError. The
    optimiser's settings are those of the run, not those of the checkpoint.
    """
    fields = changes(run.recipe, state["recipe"])
    epochs_then, epochs_now = fields.get("epochs", (0, 0))
    lengthened = isinstance(epochs_then, int) and epochs_now > epochs_then
    if lengthened:
        del fields["epochs"]
    differences = [
        f"  {key}: {then!r} in the checkpoint, {now!r} now" for key, (then, now) in fields.items()
    ]
    if state["data"] != fingerprint:
        differences.append(
            "  the training images are not the ones this run was started with "
            "(names, labels, bytes or sizes)"
        )
    rows = "\n".join(differences)
    if state["step"] > run.derived.total_steps:
        raise ValueError(
            f"{state['step']:,} steps are trained already, more than the "
            f"{run.derived.total_steps:,} of {run.recipe.epochs} epochs: choose another --out for "
            f"a shorter run\n{rows}"
        )
    misfit = what_does_not_fit(run, state)
    if differences and not force:
        advice = "--force does not help, because" if misfit else "--force continues anyway"
        raise ValueError(
            f"this is not the run that was started; {advice}"
            f"{f' {misfit}' if misfit else ''}:\n{rows}"
        )
    if misfit:
        sides = [f"{k} {then} in the checkpoint, {now} now" for k, (then, now) in fields.items()]
        raise ValueError(
            f"{'; '.join(sides[:3]) or 'the same recipe'}: this run cannot continue, because "
            f"{misfit}. Set back what changed, or start a new run in another --out"
        )
    if differences and rank() == 0:
        log.warning(f"continuing with another run's checkpoint:\n{rows}")
    if lengthened and rank() == 0:
        log.info(lengthening(run, state["step"], epochs_then))
    if state["world_size"] != world_size() and rank() == 0:
        log.info(
            f"{state['world_size']} ranks wrote this checkpoint, {world_size()} continue: the "
            f"global batches are the same, with {images_on_each(run)} images on each rank"
        )
        if run.recipe.bn == "local":
            log.warning("bn is local: from now on, BatchNorm normalises parts of another size")
    run.method.load_state_dict(state["method"])
    settings = [{k: v for k, v in group.items() if k != "params"} for group in groups_of(run)]
    run.optimizer.load_state_dict(state["optimizer"])
    for group, own_settings in zip(groups_of(run), settings, strict=True):
        group.update(own_settings)  # keep what `force` changed, such as the weight decay
    changed_type = checkpoint.restore_scaler(run.scaler, state, run.dtype)
    if changed_type and rank() == 0:
        log.warning(changed_type)
    run.step = state["step"]


def what_does_not_fit(run: Run, state: dict[str, Any]) -> str:
    """The reason why a checkpoint cannot be loaded into this run, or "" if it can."""
    if difference := first_difference(state["method"], run.method.state_dict()):
        return f"the networks do not fit ({difference})"
    saved_groups, groups = state["optimizer"]["param_groups"], groups_of(run)
    # Only the states of Adam and AdamW have betas.
    layouts = [[(len(g["params"]), "betas" in g) for g in part] for part in (saved_groups, groups)]
    return "" if layouts[0] == layouts[1] else "the optimiser's state does not fit"


def groups_of(run: Run) -> list[dict[str, Any]]:
    """The groups of parameters of the optimiser, with their settings."""
    return run.optimizer.param_groups


def lengthening(run: Run, step: int, epochs: int) -> str:
    """A line for the log about a run of `epochs` epochs that is lengthened after `step` steps."""
    before = replace(run.derived, total_steps=run.derived.steps_per_epoch * epochs)
    rates = [run.recipe.schedule(max(step - 1, 0), before)["lr"], run.schedule(step)["lr"]]
    change = "rises again" if rates[1] > rates[0] else "changes"
    return (
        f"the run is lengthened from {epochs} to {run.recipe.epochs} epochs: the schedule is now "
        f"that of {run.recipe.epochs} epochs, so the learning rate {change}, from {rates[0]:.3g} "
        f"to {rates[1]:.3g}"
    )


def open_evaluation(data: Data, recipe: Recipe, run: Run, out: Path) -> Evaluation | None:
    """The evaluation during and after training, or None, with a warning, if it is impossible.

    Raises ValueError if there are test images that cannot be used. Otherwise the scores that the
    user expects would be missing at the end.
    """
    if not recipe.evaluate:
        return None
    try:
        return Evaluation(data, recipe, run.device, run.dtype, out)
    except (FileNotFoundError, ValueError) as error:
        if not isinstance(error, NoLabelsError) and has_test_images(data, recipe):
            advice = "To train without scores: --no-eval"
            raise ValueError(f"the test images cannot be used: {error}. {advice}") from error
        log.warning(f"no kNN or linear evaluation in this run: {error}")
        return None


def has_test_images(data: Data, recipe: Recipe) -> bool:
    return not recipe.unlabelled and any(map(has_test_split, places_of(data)))


def images_on_each(run: Run) -> str:
    """The number of images of a step on each rank, such as `256`, or `4 x 64` in passes of 64."""
    passes, images = run.recipe.accumulate, run.derived.batch_per_gpu
    return f"{passes} x {images}" if passes > 1 else str(images)


def unused_gpus(run: Run) -> str:
    """A remark for a run in one process on a machine with several GPUs."""
    visible = torch.cuda.device_count()
    if world_size() > 1 or run.device.type == "cpu" or visible == 1:
        return ""
    return f"; one of {visible} GPUs is used (--gpus auto uses all)"


def announce(
    run: Run, source: Source, evaluation: Evaluation | None, out: Path, init_from: Path | None
) -> None:
    """Before the first step, log one line for each thing that was found, chosen or derived."""
    recipe, derived = run.recipe, run.derived
    why = " (rsa-fast recipes auto shows why)" if recipe.dataset == "auto" else ""
    start = f"from the weights in {init_from}" if init_from else "from scratch"
    if not init_from and (count := len(source.manifest)) <= FEW_IMAGES:
        start += f"; {count:,} images are few: --init-from starts from trained weights"
    numbers = {
        **asdict(derived),
        "batch_per_gpu": images_on_each(run),
        "parameters": sum(p.numel() for p in run.method.parameters() if p.requires_grad),
    }
    lines = {
        "images": inventory(source, evaluation.test.source if evaluation else None),
        "scores": "" if evaluation else "none",
        "recipe": f"{recipe.dataset}: {recipe.arch}, {recipe.views.size_px} px, "
        f"batch {recipe.batch_size}, {recipe.epochs} epochs = {derived.total_steps:,} steps{why}",
        "numbers": "  ".join(f"{key} {value}" for key, value in numbers.items()),
        "start": f"at step {run.step:,} of the run in {out}" if run.step else start,
        "device": f"{run.device}, {str(run.dtype).removeprefix('torch.')}{unused_gpus(run)}",
        "out": str(out),
    }
    log.info(f"{short_name(recipe.method)} on {recipe.data_name}")
    for title, text in lines.items():
        if text:
            log.info(f"  {title:9} {text}")
    if recipe.order == "blocks":
        announce_blocks(recipe, source)
    if run.derived.warmup_steps >= run.derived.total_steps:
        epochs = run.recipe.warmup_epochs
        log.warning(f"the learning rate only warms up: warmup_epochs is {epochs}")
    if run.recipe.optimizer in ("adam", "adamw") and run.derived.peak_lr > ADAM_PEAK_LR:
        log.warning(
            f"the peak learning rate {run.derived.peak_lr:g} is usual for SGD, but Adam and AdamW "
            "need about 0.001: set peak_lr"
        )


def announce_blocks(recipe: Recipe, source: Source) -> None:
    """Log how the block order reads the storage, and warn where it mixes the images badly."""
    order, extents, labels = recipe.order_of(source), source.extents, source.manifest.labels
    assert order.blocks and extents
    blocks, window = order.blocks, order.blocks.window_samples
    count, mates = blocks.numbers[-1] + 1, blocks.mates(recipe.batch_size)
    log.info(f"  {'order':9} {count:,} blocks, mixed in windows of {window:,} images")
    if mates >= 1:
        log.warning(
            f"on average, a batch contains {mates:.1f} other images of an image's block: to get "
            f"below 1, set window_mib above {recipe.window_mib}, or a smaller block_mib"
        )
    if extents.sorted_by(labels) > STORED_BY_CLASS:
        log.warning(
            "the images are stored by class, so with order = blocks a batch has few classes: "
            "shuffle them with rsa-fast convert, or set order=full"
        )
