"""A run's folder: who holds it, what a resumed run finds there, and what is left as it is."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rsa_fast.cli import main
from rsa_fast.evaluation.encoders import load_encoder
from rsa_fast.evaluation.evaluate import evaluate
from rsa_fast.evaluation.export import export
from rsa_fast.insight.report import report
from rsa_fast.pipelines.layouts import open_source
from rsa_fast.recipes import build_recipe, dump_yaml, stored_recipe
from rsa_fast.training import checkpoint, metrics
from rsa_fast.training import step as step_module
from rsa_fast.training.callbacks import Callback
from rsa_fast.training.engine import train
from rsa_fast.training.run_folder import hold_folder, read_starts
from tests.helpers import ROOT, invoke, write_folder
from tests.tiny_runs import same, tiny, weights


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> tuple[Path, dict]:
    """A run of two epochs and its result. It is not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, train(tiny(epochs=2), folder, out)


run = partial(invoke, main)


def content(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """The bytes and the time of change of every file."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def change_recipe(path: Path, change) -> None:
    """Apply `change` to the recipe in a checkpoint."""
    state = torch.load(path, weights_only=True)
    change(state["recipe"])
    torch.save(state, path)


# ---- The lock


class Intruder(Callback):
    """Tries to start in the folder of the living run, in every way."""

    def __init__(self, data: Path, out: Path) -> None:
        self.data, self.out, self.refusals, self.changed = data, out, [], []

    def on_record(self, run, record):
        before = content(self.out)
        for options in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(BlockingIOError) as refusal:
                train(tiny(), self.data, self.out, **options)
            self.refusals.append(str(refusal.value))
        self.changed.append(content(self.out) != before)


def test_a_second_start_in_the_folder_of_a_living_run_is_refused_and_names_it(
    data, tmp_path, monkeypatch
):
    # The living run itself writes checkpoints in the background. Here it waits for each of them, so
    # that a file that changes during the refused starts was changed by them.
    save = checkpoint.Writer.save

    def save_and_wait(writer, state, name=None):
        save(writer, state, name)
        writer.wait()

    monkeypatch.setattr(checkpoint.Writer, "save", save_and_wait)
    out = tmp_path / "run"
    intruder = Intruder(data, out)
    train(tiny(log_every_steps=5), data, tmp_path / "alone")
    result = train(tiny(log_every_steps=5), data, out, callbacks=[intruder])
    assert result["step"] == 15 and len(intruder.refusals) == 9 and not any(intruder.changed)
    holder = f"{out} is in use by process {os.getpid()} on {socket.gethostname()} since "
    assert all(message.startswith(holder) for message in intruder.refusals)
    assert same(weights(out), weights(tmp_path / "alone"))


HOLD = """
import os, sys, time
from pathlib import Path
from rsa_fast.training.run_folder import hold_folder

with hold_folder(Path(sys.argv[1]), resume=True, overwrite=False):
    worker = os.fork()  # such as a loader's
    if worker:
        print(worker, flush=True)
    time.sleep(600)
"""


def test_the_system_releases_the_lock_of_a_killed_process_whose_workers_survive(data, tmp_path):
    out = tmp_path / "run"
    train(tiny(), data, out, stop_at_step=5)
    command = [sys.executable, "-c", HOLD, str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        worker = int(process.stdout.readline())
        refused = run("train", "--resume", "--out", out)
        assert refused.exit_code == 1
        assert f"{out} is in use by process {process.pid} on " in refused.output
        process.kill()
        process.wait()
        assert train(tiny(), data, out, resume=True)["step"] == 15
        os.kill(worker, 0)  # it is still there
    finally:
        process.kill()
        os.kill(worker, signal.SIGKILL)


def test_where_the_file_system_has_no_locks_a_run_starts_with_a_warning(
    data, tmp_path, monkeypatch, caplog
):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    train(tiny(), data, tmp_path / "run", stop_at_step=1)
    assert "has no locks (Function not implemented)" in caplog.text


def test_a_held_folder_can_be_read(finished, folder, tmp_path):
    out, result = finished
    with hold_folder(out, resume=True, overwrite=False):
        page = report([out], tmp_path / "report.html").read_text()
        newest = checkpoint.paths_in(out / "checkpoints")[-1]
        assert evaluate(newest, folder, "knn")["knn_top1"] == result["knn_top1"]
    assert "Environment" in page and str(os.getpid()) in page


# ---- A finished run


@pytest.mark.parametrize("gone", [False, True])
def test_a_finished_run_that_is_resumed_stays_as_it_is(finished, folder, tmp_path, caplog, gone):
    out, result = finished
    before = content(out)
    caplog.set_level("INFO", "rsa_fast")
    # It needs no images: a job that is started again may find them gone.
    place = tmp_path / "gone" if gone else folder
    assert train(tiny(epochs=2), place, out, resume=True) == result
    assert f"the run in {out} finished after step 10: nothing is changed" in caplog.text
    assert content(out) == before
    done = run("train", "--resume", "--out", out)
    assert done.exit_code == 0 and json.loads(done.stdout) == result
    assert content(out) == before


def test_a_run_cannot_become_shorter_than_it_is(finished, folder):
    out, _ = finished
    before = content(out)
    for force in ({}, {"force": True}):
        with pytest.raises(ValueError, match=r"10 steps are trained.*the 5 of 1 epochs: choose"):
            train(tiny(epochs=1), folder, out, resume=True, **force)
    names = {path for path in before if path.name != "run.lock"}
    assert {path: value for path, value in content(out).items() if path in names} == {
        path: before[path] for path in names
    }


def test_another_recipe_s_finished_run_is_refused(finished, folder):
    with pytest.raises(ValueError, match=r"beta_base: 0\.3 in the checkpoint, 0\.4 now"):
        train(tiny(epochs=2, beta_base=0.4), folder, finished[0], resume=True)


def test_a_run_killed_in_its_last_evaluation_gets_the_result_that_it_would_have_had(
    finished, folder, tmp_path
):
    out, result = finished
    shutil.copytree(out, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    again = train(tiny(epochs=2), folder, tmp_path / "run", resume=True)
    assert again == {**result, "out": str(tmp_path / "run")}


# ---- What a run remembers


def test_env_json_keeps_every_start(data, tmp_path, monkeypatch):
    for stop, argument in ((3, "first"), (7, "second"), (None, "third")):
        monkeypatch.setattr(sys, "argv", ["rsa-fast", argument])
        train(tiny(), data, tmp_path / "run", resume=argument != "first", stop_at_step=stop)
    starts = json.loads((tmp_path / "run" / "env.json").read_text())
    assert [start["command"] for start in starts] == [
        ["rsa-fast", argument] for argument in ("first", "second", "third")
    ]
    assert [start["step"] for start in starts] == [0, 3, 7]
    assert all("torch" in start["packages"] for start in starts)
    source = open_source(data, "pretrain")
    assert {start["images"] for start in starts} == {len(source.manifest)}
    assert {start["classes"] for start in starts} == {len(source.manifest.classes)}
    steps = len(source.manifest) // tiny().batch_size
    assert {start["steps_per_epoch"] for start in starts} == {steps}
    train(tiny(), data, tmp_path / "run", overwrite=True, stop_at_step=1)
    assert len(read_starts(tmp_path / "run")) == 1


def test_the_env_json_of_earlier_versions_is_the_first_start(data, tmp_path):
    train(tiny(), data, tmp_path, stop_at_step=3)
    (tmp_path / "env.json").write_text('{"command": ["old"], "job": null}')
    train(tiny(), data, tmp_path, resume=True, stop_at_step=4)
    first, second = read_starts(tmp_path)
    assert first["command"] == ["old"] and second["data"] == [str(data)]


def test_resume_with_the_folder_alone_goes_on_with_its_recipe_and_its_images(
    data, tmp_path, monkeypatch
):
    places = [data, write_folder(tmp_path / "more", {"train": 4})]
    monkeypatch.chdir(tmp_path)
    relative = [Path(os.path.relpath(place)) for place in places]
    recipe = tiny(beta_base=0.4, **{"views.blur_p": 0.25})
    train(recipe, places, tmp_path / "whole")
    train(recipe, relative, tmp_path / "run", stop_at_step=7)
    monkeypatch.chdir("/")
    done = run("train", "--resume", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["step"] == 18
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_images_that_moved_are_named_and_data_says_where_they_are(data, tmp_path):
    old, new, out = tmp_path / "old", tmp_path / "new", tmp_path / "run"
    shutil.copytree(data, old)
    train(tiny(), old, out, stop_at_step=3)
    old.rename(new)
    refused = run("train", "--resume", "--out", out)
    assert refused.exit_code == 1
    assert f"images in {old}, which does not exist: give their new place" in refused.output
    done = run("train", "--resume", "--out", out, "--data", new)
    assert done.exit_code == 0 and json.loads(done.stdout)["step"] == 15
    assert read_starts(out)[-1]["data"] == [str(new)]


def test_resume_starts_where_there_is_no_folder(data, tmp_path, caplog):
    caplog.set_level("INFO", "rsa_fast")
    out = tmp_path / "new" / "run"
    assert train(tiny(), data, out, resume=True, stop_at_step=3)["step"] == 3
    assert f"{out} has no checkpoint yet: starting at step 0" in caplog.text
    # Without a folder there is nothing that says where the images are.
    assert "give the folder with the images" in run("train", "--resume", "--out", "none").output


def test_more_epochs_lengthen_a_run_and_say_what_the_learning_rate_does(
    finished, folder, tmp_path, caplog
):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    caplog.set_level("INFO", "rsa_fast")
    done = run("train", "--resume", "--out", out, "--epochs", 5, "--data", folder)
    assert done.exit_code == 0 and json.loads(done.stdout)["step"] == 25, done.output
    # Cosines: the last of 2 epochs, and the third of 5, of a peak of 0.5 * 8 / 256.
    peak = 0.5 * 8 / 256
    last, following = (0.5 * peak * (1 + math.cos(math.pi * x)) for x in (1 / 2, 2 / 5))
    sentence = (
        "the run is lengthened from 2 to 5 epochs: the schedule is now that of 5 epochs, so the "
        f"learning rate rises again, from {last:.3g} to {following:.3g}"
    )
    assert caplog.text.count(sentence) == 1, caplog.text
    assert build_recipe("cifar10", "rsa", out / "recipe.yaml").epochs == 5
    assert checkpoint.load_latest(out / "checkpoints")["recipe"]["epochs"] == 5
    # It is finished again. Another field is still refused, together with more epochs too.
    assert json.loads(run("train", "--resume", "--out", out).stdout)["step"] == 25
    with pytest.raises(ValueError, match=r"--force continues anyway:\n  tau_base: 0\.99 in"):
        train(tiny(epochs=6, tau_base=0.9), folder, out, resume=True)


# ---- Starts that fail


def test_a_start_without_wandb_touches_nothing(data, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb is true, but the package is not installed"):
        train(tiny(wandb=True), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_wandb_that_cannot_be_imported_is_refused_like_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match=r"cannot be imported \(ModuleNotFoundError: .*not_there"):
        train(tiny(wandb=True), tmp_path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_failed_start_left_does_not_block_the_corrected_command(
    data, tmp_path, monkeypatch, caplog
):
    def init(**_: object) -> None:
        raise RuntimeError("no network")

    out, module = tmp_path / "run", SimpleNamespace(init=init, __spec__=object())
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(RuntimeError, match="no network"):
        train(tiny(wandb=True, seed=7), data, out)
    assert {"recipe.yaml", "env.json", "metrics.jsonl"} <= {path.name for path in out.iterdir()}
    caplog.set_level("INFO", "rsa_fast")
    train(tiny(), data, out, stop_at_step=3)
    assert f"{out} contains only the files of an earlier start that failed" in caplog.text
    assert len(read_starts(out)) == 1 and not (out / "wandb").exists()
    train(tiny(), data, tmp_path / "clean", stop_at_step=3)
    assert same(weights(out), weights(tmp_path / "clean"))


@pytest.mark.parametrize("name", ["recipe.yaml", "notes.txt"])
def test_a_file_of_one_s_own_is_still_no_empty_folder(data, tmp_path, name):
    (tmp_path / name).write_text("mine: 1")
    with pytest.raises(FileExistsError, match="is not empty"):
        train(tiny(), data, tmp_path)
    assert (tmp_path / name).read_text() == "mine: 1"


# ---- Another precision


@pytest.mark.parametrize("old_version", [False, True])
@pytest.mark.parametrize(("first", "second"), [("bf16", "fp16"), ("fp16", "bf16")])
def test_a_run_resumed_in_another_precision_says_so(
    data, tmp_path, monkeypatch, caplog, first, second, old_version
):
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    recipe = tiny(precision="auto", epochs=2)
    for name, stop in ((first, 5), (second, None)):
        monkeypatch.setattr(step_module, "choose_dtype", lambda *_, name=name: dtypes[name])
        result = train(recipe, data, tmp_path / "run", resume=True, stop_at_step=stop)
        path = checkpoint.paths_in(tmp_path / "run" / "checkpoints")[-1]
        state = torch.load(path, weights_only=True)
        assert state["dtype"] == str(dtypes[name]).removeprefix("torch.")
        assert bool(state["scaler"]) == (name == "fp16")
        if old_version:
            del state["dtype"]
            torch.save(state, path)
    assert result["step"] == 10
    line = "and the run continues in float16, with a new loss scaler"
    if second == "bf16":
        line = "this checkpoint was computed in float16, and the run continues in bfloat16"
    assert caplog.text.count(line) == 1 and caplog.text.count("was computed in") == 1


def test_force_changes_the_precision_too(data, tmp_path, caplog):
    train(tiny(precision="fp32"), data, tmp_path, stop_at_step=5)
    result = train(tiny(precision="fp16"), data, tmp_path, resume=True, force=True)
    assert result["step"] == 15
    assert "computed in float32, and the run continues in float16, with a new" in caplog.text


# ---- Another version


def of_another_version(fields: dict) -> None:
    """The recipe of a version with fields more, and with fields fewer.

    Of those that are missing, one has a default, and the others are in the rows.
    """
    del fields["accumulate"], fields["momentum"], fields["views"]["hue"], fields["views"]["mean"]
    del fields["weight_decay"]
    fields["zoom"] = 3
    fields["views"]["fog_p"] = 0.5


UNKNOWN = "has recipe fields that this version does not know: zoom = 3, views.fog_p = 0.5 (ignored)"


def test_a_stored_recipe_of_another_version_is_read_and_says_what_is_ignored(caplog):
    caplog.set_level("INFO", "rsa_fast")
    for recipe in (build_recipe("cifar10", "rsa"), build_recipe("demo", "moco")):
        fields = recipe.model_dump(mode="json")
        of_another_version(fields)
        caplog.clear()
        assert stored_recipe(fields, "the checkpoint").model_copy(
            update={"views": recipe.views}
        ) == recipe and caplog.messages == [f"the checkpoint {UNKNOWN}"]
    # A missing field has its default, not what a row says now.
    fields = build_recipe("demo", "rsa").model_dump(mode="json")
    assert fields["knn_every_epochs"] != 10
    del fields["knn_every_epochs"]
    assert stored_recipe(fields).knn_every_epochs == 10


def test_a_checkpoint_of_another_version_is_resumed_scored_exported_and_started_from(
    folder, tmp_path, caplog
):
    caplog.set_level("INFO", "rsa_fast")
    out = tmp_path / "run"
    train(tiny(), folder, tmp_path / "whole")
    train(tiny(), folder, out, stop_at_step=5)
    (path,) = checkpoint.paths_in(out / "checkpoints")
    change_recipe(path, of_another_version)

    caplog.clear()
    _, recipe = load_encoder(path)
    assert recipe == tiny() and caplog.messages == [f"the checkpoint {UNKNOWN}"]
    assert "knn_top1" in evaluate(path, folder, "knn")
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    export(path, "safetensors", tmp_path / "release" / "encoder.safetensors")
    train(tiny(), folder, tmp_path / "next", init_from=path, stop_at_step=1)

    caplog.clear()
    train(tiny(), folder, out, resume=True)
    assert caplog.text.count(f"the checkpoint {UNKNOWN}") == 1
    assert same(weights(out), weights(tmp_path / "whole"))


def test_a_real_difference_is_refused_beside_a_field_of_another_version(data, tmp_path):
    train(tiny(), data, tmp_path, stop_at_step=5)
    change_recipe(checkpoint.paths_in(tmp_path / "checkpoints")[0], of_another_version)
    with pytest.raises(ValueError) as refusal:
        train(tiny(beta_base=0.4), data, tmp_path, resume=True)
    assert str(refusal.value).splitlines()[1:] == ["  beta_base: 0.3 in the checkpoint, 0.4 now"]


def test_a_run_s_own_recipe_may_be_of_another_version_and_a_user_s_may_not(data, tmp_path, caplog):
    caplog.set_level("INFO", "rsa_fast")
    out = tmp_path / "run"
    train(tiny(), data, out, stop_at_step=5)
    text = dump_yaml(tiny()).replace("views:\n", "zoom: 3\nviews:\n  fog_p: 0.5\n")
    (out / "recipe.yaml").write_text(text)
    change_recipe(checkpoint.paths_in(out / "checkpoints")[0], of_another_version)
    for words, message in (
        (("--set", "bata_base=1"), "no field 'bata_base' (did you mean 'beta_base'?)"),
        (("--config", out / "recipe.yaml"), "no field 'zoom'"),
    ):
        refused = run("train", "--resume", "--out", out, *words)
        assert refused.exit_code == 1 and message in refused.output
    caplog.clear()
    done = run("train", "--resume", "--out", out)
    assert done.exit_code == 0 and json.loads(done.stdout)["step"] == 15, done.output
    assert f"{out / 'recipe.yaml'} {UNKNOWN}" in caplog.text
