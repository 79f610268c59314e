"""Training: the loop over steps, its records and checkpoints, and resuming it exactly.

result = train(build_recipe("cifar10", "rsa"), data=Path("data/cifar10"), out=Path("runs/a"))
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipelines import Loader, Order, open_source, open_views
from rsa_fast.distributed import (
    STOP_SIGNALS,
    Heartbeat,
    barrier,
    highest,
    process_group,
    rank,
    restarted,
    world_size,
)
from rsa_fast.evaluation.evaluate import Evaluation
from rsa_fast.evaluation.feature_stats import feature_stats
from rsa_fast.recipes import FREE_FIELDS, Recipe, dump_yaml
from rsa_fast.training import checkpoint
from rsa_fast.training.meter import Meter, warn_of_collapse
from rsa_fast.training.metrics import Metrics, environment
from rsa_fast.training.run_folder import (
    begun,
    check_folder,
    full_disk_named,
    job,
    prepare_folder,
    report_or_say,
    write_text,
)
from rsa_fast.training.step import Run, build_run, train_step


class StoppedError(Exception):
    """A signal ended the run after its checkpoint was written."""


def train(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    init_from: Path | None = None,
    force: bool = False,
    stop_at_step: int | None = None,
) -> dict[str, Any] | None:
    """Train a recipe on the images under `data` into the folder `out`; returns the result that is also in `result.json`.

    `resume` goes on from the newest whole checkpoint in `out`, bit for bit as if never stopped, and starts the run there
    where it has none yet; with `force` also where the recipe or the data differ, which is said. `init_from` starts from
    another run's weights; `overwrite` deletes the run in `out` once this one is ready to start; `stop_at_step` checkpoints
    and returns early. Under torchrun every rank calls this and rank 0 gets the result; a run that torchrun starts again after
    a rank died is resumed.

    Raises FileExistsError when `out` is not empty and neither resumed nor overwritten, ValueError when the recipe or the
    data of a resumed run changed, FloatingPointError when the loss or a weight is not finite, OSError when a checkpoint cannot
    be written, ConnectionError when a rank stopped answering, and StoppedError when a signal ended the run.
    """
    with process_group(recipe.device, recipe.timeout_s) as heartbeat, full_disk_named(out):
        if restarted() and begun(out):
            resume, overwrite = True, False
        if rank() == 0:
            check_folder(out, resume, overwrite)
        barrier()
        source = open_source(data, "pretrain", cache=out)
        recipe.check_labels(source.manifest.labelled, len(source.manifest.classes))
        run = build_run(recipe, len(source.manifest))
        if resume and checkpoint.listed(out / "checkpoints"):
            restore(
                run, checkpoint.load_latest(out / "checkpoints"), source.manifest.fingerprint, force
            )
        elif init_from:
            run.method.load_state_dict(checkpoint.load(init_from)["method"])
        if (furthest := highest(run.step)) != run.step:  # a network disk shows a new file late
            raise FileNotFoundError(
                f"{out}: rank {rank()} found the checkpoint of step {run.step}, another rank {furthest}'s"
            )
        evaluation = open_evaluation(data, recipe, run, out)
        if rank() == 0:
            if resume and run.step == 0:
                print(f"{out} has no checkpoint yet: starting at step 0", file=sys.stderr)
            announce(run, len(source.manifest))
        order = Order(len(source.manifest), recipe.batch_size, recipe.seed, rank(), world_size())
        with (
            open_views(
                source,
                recipe.views,
                run.method.reads,
                order,
                device=run.device,
                dtype=run.dtype,
                **recipe.loading,
            ) as loader,
            stop_signals() as asked,
        ):
            barrier()  # nothing keeps any rank from starting: an old run may go
            if rank() == 0:
                prepare_folder(out, resume, overwrite)
                write_text(out / "env.json", json.dumps({**environment(), "job": job()}, indent=1))
                write_text(out / "recipe.yaml", dump_yaml(recipe))
            with (
                Metrics(out, run.plan.total_steps, run.step, recipe.wandb) as metrics,
                checkpoint.Writer(out / "checkpoints", recipe.keep_last)
                if rank() == 0
                else nullcontext() as writer,
            ):
                loop = Loop(
                    run,
                    loader,
                    metrics,
                    evaluation,
                    writer,
                    out,
                    source.manifest.fingerprint,
                    asked,
                    heartbeat,
                )
                result = loop.run_until(
                    min(stop_at_step or run.plan.total_steps, run.plan.total_steps)
                )
        if asked and run.step < run.plan.total_steps:
            raise StoppedError(
                f"{asked[0].name}: stopped after step {run.step}, which is saved; go on with --resume"
            )
        return result if rank() == 0 else None


@dataclass
class Loop:
    """Steps, and what happens between them: records, checkpoints, evaluation."""

    run: Run
    loader: Loader
    metrics: Metrics
    evaluation: Evaluation | None
    writer: checkpoint.Writer | None  # on rank 0
    out: Path
    fingerprint: str
    asked: list[signal.Signals]
    heartbeat: Heartbeat

    def run_until(self, end: int) -> dict[str, Any]:
        """Train up to step `end`, or to where a signal asks to stop; returns the result."""
        run, recipe, per_epoch = self.run, self.run.recipe, self.run.plan.steps_per_epoch
        meter = Meter(recipe.batch_size, run.device)
        while run.step < end:
            if run.step % per_epoch == 0:
                self.score_knn(run.step // per_epoch)
            meter.restart()
            self.heartbeat.doing = f"waiting for the views of step {run.step}"
            for batch in meter.waiting(
                self.loader.batches(run.step // per_epoch, run.step % per_epoch)
            ):
                self.heartbeat.doing = f"in step {run.step}"
                meter.add(run.step, train_step(run, batch), run.skipped)
                due = run.step % recipe.log_every_steps == 0
                if self.stop_asked(due):
                    end = run.step
                if due or run.step == end:
                    self.record(meter)
                if run.step == end:
                    break
                self.heartbeat.doing = f"waiting for the views of step {run.step}"
            done = run.step // per_epoch
            if (
                run.step % per_epoch == 0 and rank() == 0
            ):  # before the checkpoint, from which a resumed run goes on
                self.metrics.write(
                    {"step": run.step, "epoch": done, **feature_stats(run.method.encoder, batch)}
                )
            if run.step == end or done % recipe.checkpoint_every_epochs == 0:
                self.save(meter)
        scores = {}
        if self.evaluation and run.step == run.plan.total_steps:
            scores = self.evaluate(self.evaluation, "knn", "linear-fast")
            self.metrics.write({"step": run.step, "epoch": recipe.epochs, **scores})
        result = {
            "out": str(self.out),
            "method": recipe.method,
            "dataset": recipe.dataset,
            "step": run.step,
        }
        result |= {
            **meter.summary(),
            "knn_top1": None,
            "knn20_top1": None,
            "linear_top1": None,
            **scores,
        }
        if self.writer:
            self.writer.wait()
            write_text(self.out / "result.json", json.dumps(result))
            if run.step == run.plan.total_steps:  # a run that was told to stop has no time for it
                report_or_say(self.out)
        return result

    def record(self, meter: Meter) -> None:
        """Write the means since the last record. Raises FloatingPointError when training has gone wrong."""
        record = {"step": self.run.step, **meter.read(), **self.run.schedule(self.run.step - 1)}
        self.check(meter)
        self.metrics.write(record)
        warn_of_collapse(record)

    def save(self, meter: Meter) -> None:
        """Write a checkpoint. Raises FloatingPointError when training has gone wrong: what is kept is good."""
        self.heartbeat.doing = "writing a checkpoint"
        meter.look()
        self.check(meter)
        state = self.run.method.state_dict()
        finite = torch.stack([x.isfinite().all() for x in state.values()]).all()
        if highest(int(~finite)):
            self.stop_at_fault(
                self.run.step - 1,
                f"the weights or statistics after step {self.run.step - 1} are not finite",
            )
        if self.writer:
            self.writer.save(snapshot(self.run, self.fingerprint))

    def check(self, meter: Meter) -> None:
        if self.run.scaler.is_enabled():
            if meter.worst_skips >= self.run.recipe.max_skips:
                fault = f"fp16 overflowed in {meter.worst_skips} steps in a row, up to step {meter.worst_step}"
                self.stop_at_fault(meter.worst_step, fault)
        elif meter.first_bad is not None:
            self.stop_at_fault(meter.first_bad, f"the loss of step {meter.first_bad} is not finite")

    def stop_at_fault(self, step: int, fault: str) -> None:
        """Leave in nonfinite.json what it takes to make the batch of `step` again. Raises FloatingPointError."""
        if self.writer:
            self.writer.wait()
        order = Order(self.loader.job.order.count, self.run.recipe.batch_size, self.run.recipe.seed)
        epoch, place = divmod(step, len(order))
        last = checkpoint.listed(self.out / "checkpoints")
        found = {
            "step": step,
            "epoch": epoch,
            "fault": fault,
            "checkpoint": str(last[-1]) if last else None,
        }
        if rank() == 0:
            write_text(
                self.out / "nonfinite.json",
                json.dumps(found | {"sample_ids": order.ids(epoch, place).tolist()}),
            )
        raise FloatingPointError(
            f"{fault}: lower the learning rate or add warm-up epochs. "
            f"Last good checkpoint: {found['checkpoint']}; the batch's sample ids: {self.out / 'nonfinite.json'}"
        )

    def stop_asked(self, due: bool) -> bool:
        """Whether a signal asks to stop. Several ranks agree on a CPU every step, which takes .2 ms, on a GPU when a record is
        due and waits for the device anyway."""
        if world_size() > 1 and not (due or self.run.device.type == "cpu"):
            return False
        if number := highest(self.asked[0] if self.asked else 0):
            self.asked.append(signal.Signals(number))
        return bool(number)

    def score_knn(self, epoch: int) -> None:
        every = self.run.recipe.knn_every_epochs
        if self.evaluation and every and epoch % every == 0:
            scores = self.evaluate(self.evaluation, "knn")
            self.metrics.write({"step": self.run.step, "epoch": epoch, **scores})

    def evaluate(self, evaluation: Evaluation, *protocols: str) -> dict[str, Any]:
        """Scores of the encoder that rank 0 keeps: with bn = local each rank has running statistics of its own."""
        self.heartbeat.doing = "evaluating"
        if world_size() > 1:
            for buffer in self.run.method.encoder.buffers():
                dist.broadcast(buffer, 0)
        return evaluation.score(self.run.method.encoder, protocols)


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Collects the signals that ask to stop, so that the step can be finished. A second one takes effect at once."""
    asked: list[signal.Signals] = []

    def note(number: int, _: Any) -> None:
        asked.append(signal.Signals(number))
        print(f"{asked[0].name}: finishing the step, then saving", file=sys.stderr)
        signal.signal(number, previous[number])

    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield asked
        return
    previous = {int(number): signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number in STOP_SIGNALS:
            signal.signal(number, previous[number])


def snapshot(run: Run, fingerprint: str) -> dict[str, Any]:
    """All that a checkpoint holds."""
    return {
        "step": run.step,
        "recipe": run.recipe.model_dump(mode="json"),
        "data": fingerprint,
        "method": run.method.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "world_size": world_size(),
    }


def restore(run: Run, state: dict[str, Any], fingerprint: str, force: bool = False) -> None:
    """Put a checkpoint into a fresh run. Raises ValueError with the difference when recipe or data are not the same, unless
    told to `force` it: then the difference is a warning."""
    now, then = run.recipe.model_dump(mode="json"), state["recipe"]
    rows = [
        f"  {key}: {then.get(key)!r} in the checkpoint, {now.get(key)!r} now"
        for key in now | then
        if key not in FREE_FIELDS and now.get(key) != then.get(key)
    ]
    if state["data"] != fingerprint:
        rows.append(
            "  the training images are not the ones this run was started with (names, labels, bytes or sizes)"
        )
    if rows and not force:
        raise ValueError(
            "this is not the run that was started; --force goes on all the same:\n"
            + "\n".join(rows)
        )
    if rows and rank() == 0:
        print("going on with another run's checkpoint:\n" + "\n".join(rows), file=sys.stderr)
    if state["world_size"] != world_size() and rank() == 0:
        ranks = f"{state['world_size']} ranks wrote this checkpoint, {world_size()} go on"
        print(
            f"{ranks}: the same global batches, {run.plan.batch_per_gpu} images on each",
            file=sys.stderr,
        )
        if run.recipe.bn == "local":
            print("bn is local: BatchNorm now normalises parts of another size", file=sys.stderr)
    run.method.load_state_dict(state["method"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    run.step = state["step"]


def open_evaluation(data: Path, recipe: Recipe, run: Run, out: Path) -> Evaluation | None:
    try:
        return Evaluation(data, recipe, run.device, run.dtype, out)
    except (FileNotFoundError, ValueError) as error:
        print(f"no kNN or linear evaluation in this run: {error}", file=sys.stderr)
        return None


def announce(run: Run, count: int) -> None:
    """The derived numbers, on stderr, before the first step."""
    numbers = {
        "images": count,
        **asdict(run.plan),
        "device": str(run.device),
        "dtype": str(run.dtype).removeprefix("torch."),
    }
    numbers["parameters"] = sum(p.numel() for p in run.method.parameters() if p.requires_grad)
    print("  ".join(f"{key} {value}" for key, value in numbers.items()), file=sys.stderr)
    if run.plan.warmup_steps >= run.plan.total_steps:
        print(
            f"the learning rate only warms up: warmup_epochs is {run.recipe.warmup_epochs}",
            file=sys.stderr,
        )
