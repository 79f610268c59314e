from __future__ import annotations

import json
import shlex

import pytest
import torch

from rsa_fast.cli import main
from rsa_fast.methods import method_class
from rsa_fast.pipelines.views import VIEWS, Batch
from rsa_fast.recipes import build_recipe
from rsa_fast.training import checkpoint
from rsa_fast.training.engine import train, unused_gpus
from rsa_fast.training.metrics import read_metrics
from rsa_fast.training.step import build_run, choose_dtype, train_step
from tests.helpers import DALI, FFCV, invoke, result_of, write_folder, write_raw_beton
from tests.tiny_runs import TINY, check_resumption, same, tiny, weights


# An epoch has 5 steps: the run stops in the middle of one, or between two.
@pytest.mark.parametrize("stop", [7, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("backend", "aggressive_on"),
    [
        *[(backend, place) for backend in ("resident", "native") for place in ("host", "device")],
        pytest.param("dali", "host", marks=DALI),
        pytest.param("ffcv", "host", marks=FFCV),
        ("torchvision", "host"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    folder, beton, tmp_path, backend, aggressive_on, stop
):
    recipe = tiny(backend=backend, aggressive_on=aggressive_on)
    data = beton if backend == "ffcv" else folder
    train(recipe, data, tmp_path / "whole")
    train(recipe, data, tmp_path / "parts", stop_at_step=stop)
    assert checkpoint.load_latest(tmp_path / "parts" / "checkpoints")["step"] == stop
    train(recipe, data, tmp_path / "parts", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    momenta = [
        checkpoint.load_latest(tmp_path / out / "checkpoints")["optimizer"]["state"]
        for out in ("whole", "parts")
    ]
    assert all(
        torch.equal(momenta[0][i]["momentum_buffer"], momenta[1][i]["momentum_buffer"])
        for i in momenta[0]
    )


@pytest.mark.parametrize("backend", ["native", pytest.param("ffcv", marks=FFCV)])
def test_the_block_order_is_resumed_within_a_window_and_announced(tmp_path, caplog, backend):
    data = write_raw_beton(tmp_path / "data", 40, 200)
    recipe = tiny(backend=backend, order="blocks", window_mib=2, epochs=2)
    caplog.set_level("INFO", "rsa_fast")
    train(recipe, data, tmp_path / "whole")
    assert "order     5 blocks, mixed in windows of 17 images" in caplog.text
    assert "other images of an image's block: to get below 1, set window_mib above" in caplog.text
    assert "stored by class" not in caplog.text
    train(recipe, data, tmp_path / "parts", stop_at_step=7)
    train(recipe, data, tmp_path / "parts", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    train(tiny(backend=backend, epochs=2), data, tmp_path / "full")
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "full"))


def test_the_block_order_is_refused_for_files_and_resumed_with_the_same_blocks_only(
    folder, tmp_path
):
    with pytest.raises(ValueError, match=r"order = blocks needs .beton files or tar shards, and"):
        train(tiny(order="blocks"), folder, tmp_path / "files")
    data = write_raw_beton(tmp_path / "data", 40, 32)
    train(tiny(order="blocks"), data, tmp_path / "run", stop_at_step=1)
    with pytest.raises(ValueError, match="block_mib: 1 in the checkpoint, 2 now"):
        train(tiny(order="blocks", block_mib=2), data, tmp_path / "run", resume=True)
    message = "window_mib = 64 is only for order=blocks, but order is full"
    with pytest.raises(ValueError, match=message):
        tiny(window_mib=64)


@pytest.mark.parametrize(("precision", "optimizer"), [("bf16", "sgd"), ("fp16", "lars")])
def test_resuming_is_exact_in_every_precision(folder, tmp_path, precision, optimizer):
    recipe = tiny(precision=precision, optimizer=optimizer, epochs=2, warmup_epochs=1)
    check_resumption(recipe, folder, tmp_path)


def test_resuming_is_exact_with_a_queue(folder, tmp_path):
    check_resumption(tiny("ressl", bn="split:2", queue_size=32, epochs=2), folder, tmp_path)


# What some keep: a bank, a queue, a centre, frozen layers, Adam's moments, draws by the step.
RESUMED = {
    "swav": {"prototypes": 7, "queue_size": 16, "queue_start_epoch": 0, "hidden_dim": 8},
    "dino": {"out_dim": 9, "bottleneck_dim": 4, "hidden_dim": 8},
    "w-mse": {"out_dim": 2, "hidden_dim": 8, "lr_drop_epochs": (1,), "warmup_epochs": 0},
    "inst-dis": {"out_dim": 4, "negatives": 8},
    "pirl": {"out_dim": 4, "negatives": 0},
    "infomin": {"out_dim": 4, "queue_size": 32, "bn": "split:2"},
    "jcl": {"out_dim": 4, "queue_size": 32, "bn": "split:2"},
    "barlow-twins": {"out_dim": 4, "hidden_dim": 8},
}


@pytest.mark.parametrize("method", RESUMED)
def test_the_state_of_every_method_is_resumed_within_an_epoch(folder, tmp_path, method):
    fields = TINY | {"epochs": 2, "base_lr": 0.1} | RESUMED[method]
    known = method_class(method).recipe_type.model_fields.keys() | {"views.size_px"}
    fields = {name: value for name, value in fields.items() if name in known}
    recipe = build_recipe("cifar10", method, overrides=fields)
    check_resumption(recipe, folder, tmp_path, stop=7)


def test_a_run_folder_is_complete(folder, tmp_path):
    recipe = tiny(knn_every_epochs=1)
    result = train(recipe, folder, tmp_path / "run")
    records = read_metrics(tmp_path / "run")
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [2, 4, 6, 8, 10, 12, 14, 15]
    for record in steps:
        names = {
            "loss",
            "weak",
            "aggressive",
            "beta",
            "tau",
            "lr",
            "step_ms",
            "images_per_s",
            "wait_pct",
        }
        assert names <= record.keys()
        mixed = (1 - record["beta"]) * record["weak"] + record["beta"] * record["aggressive"]
        # The values are means over two steps of a slowly changing beta.
        assert record["loss"] == pytest.approx(mixed, abs=0.05)
    assert (
        steps[0]["lr"] == pytest.approx(tiny().base_lr * 8 / 256, rel=0.02)
        and steps[-1]["tau"] == 1
    )
    assert [record["epoch"] for record in records if "knn_top1" in record] == [0, 1, 2, 3]
    assert result["knn_top1"] is not None and 0 <= result["linear_top1"] <= 100
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert build_recipe("cifar10", "rsa", tmp_path / "run" / "recipe.yaml") == recipe
    assert "torch" in json.loads((tmp_path / "run" / "env.json").read_text())[-1]["packages"]
    assert len(checkpoint.paths_in(tmp_path / "run" / "checkpoints")) == 2  # This is keep_last.


def test_training_lowers_the_loss_and_evaluation_changes_nothing(folder, tmp_path):
    train(tiny(epochs=12, log_every_steps=5), folder, tmp_path / "quiet")
    train(tiny(epochs=12, log_every_steps=5, knn_every_epochs=1), folder, tmp_path / "watched")
    losses = [record["loss"] for record in read_metrics(tmp_path / "quiet") if "loss" in record]
    assert losses[-1] < 0.8 * losses[0]
    assert same(weights(tmp_path / "quiet"), weights(tmp_path / "watched"))


def test_a_folder_in_use_is_refused_until_told_what_to_do(folder, tmp_path):
    out = tmp_path / "run"
    train(tiny(epochs=1), folder, out)
    with pytest.raises(
        FileExistsError, match=r"not empty: continue with --resume, start again with --overwrite"
    ):
        # The run is refused before it looks for images.
        train(tiny(epochs=1), tmp_path / "nowhere", out)
    (out / "notes.txt").write_text("mine")
    train(tiny(epochs=1, seed=5), folder, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert {record["step"] for record in read_metrics(out)} == {2, 4, 5}


def test_an_old_run_is_deleted_only_when_the_new_one_can_start(folder, tmp_path):
    out = tmp_path / "run"
    train(tiny(epochs=1), folder, out)
    old = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    # The first has larger batches than there are images, the second needs .beton files.
    few, unfit = tiny(batch_size=64), tiny(backend="ffcv")
    for recipe, data in ((tiny(), tmp_path / "nowhere"), (few, folder), (unfit, folder)):
        with pytest.raises((ValueError, FileNotFoundError)):
            train(recipe, data, out, overwrite=True)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == old


def test_ranks_that_find_different_checkpoints_do_not_train(folder, tmp_path, monkeypatch):
    train(tiny(), folder, tmp_path, stop_at_step=5)
    monkeypatch.setattr("rsa_fast.training.engine.max_over_ranks", lambda step: step + 5)
    message = "rank 0 found the checkpoint of step 5, and another rank that of step 10; start again"
    with pytest.raises(FileNotFoundError, match=message):
        train(tiny(), folder, tmp_path, resume=True)


def test_a_run_that_a_bad_image_stopped_goes_on_with_skip_as_if_it_had_skipped_from_the_start(
    tmp_path,
):
    data = write_folder(tmp_path / "data", {"train": 20})
    for out, policy in (("stopped", "stop"), ("skipping", "skip")):
        train(tiny(backend="native", on_bad_image=policy), data, tmp_path / out, stop_at_step=5)
    image = data / "train" / "class_0" / "003.jpg"
    content = image.read_bytes()
    tables = content.index(b"\xff\xc4") + 5  # The header stays intact.
    image.write_bytes(content[:tables] + b"\xff" * 16 + content[tables + 16 :])
    with pytest.raises(ValueError, match=r"class_0/003\.jpg: .*--on-bad-image skip"):
        train(tiny(backend="native"), data, tmp_path / "stopped", resume=True)
    for out in ("stopped", "skipping"):
        train(tiny(backend="native", on_bad_image="skip"), data, tmp_path / out, resume=True)
    assert same(weights(tmp_path / "stopped"), weights(tmp_path / "skipping"))


def test_a_changed_recipe_or_dataset_is_refused_with_the_difference(folder, tmp_path):
    train(tiny(), folder, tmp_path / "run", stop_at_step=4)
    with pytest.raises(ValueError, match=r"beta_base: 0\.3 in the checkpoint, 0\.4 now"):
        train(tiny(beta_base=0.4), folder, tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="the training images are not the ones"):
        train(
            tiny(),
            write_folder(tmp_path / "other", {"train": 19, "test": 1}),
            tmp_path / "run",
            resume=True,
        )
    # Neither setting changes the result.
    train(tiny(log_every_steps=1, threads=1), folder, tmp_path / "run", resume=True)


def test_metrics_after_the_resumed_step_are_forgotten(folder, tmp_path):
    train(tiny(), folder, tmp_path / "run", stop_at_step=6)
    path = tmp_path / "run" / "metrics.jsonl"
    # The run was killed after its last checkpoint.
    path.write_text(path.read_text() + '{"step": 8, "loss": 9}\n{"step": 9, "lo')
    train(tiny(), folder, tmp_path / "run", resume=True)
    steps = [record["step"] for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert steps == [2, 4, 6, 8, 10, 12, 14, 15]


def test_init_from_takes_the_weights_and_nothing_else(folder, tmp_path):
    train(tiny(epochs=1), folder, tmp_path / "first")
    (path,) = checkpoint.paths_in(tmp_path / "first" / "checkpoints")
    frozen = tiny(base_lr=1e-9, tau_base=1, weight_decay=0)
    train(frozen, folder, tmp_path / "second", init_from=path, stop_at_step=1)
    second = checkpoint.load_latest(tmp_path / "second" / "checkpoints")
    first = weights(tmp_path / "first")
    assert second["step"] == 1
    for key, value in second["method"].items():
        if "weight" in key:
            torch.testing.assert_close(value, first[key], atol=1e-6, rtol=1e-4)


def test_unlabelled_data_trains_without_evaluation(folder, tmp_path, caplog):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate((folder / "train").rglob("*.jpg")):
        (flat / f"{i}.jpg").write_bytes(path.read_bytes())
    result = train(tiny(epochs=1), flat, tmp_path / "run")
    assert result["knn_top1"] is None and result["step"] == 5
    assert "no kNN or linear evaluation in this run" in caplog.text


def test_the_step_computes_losses_and_weights_in_float32_under_autocast():
    run = build_run(tiny(precision="bf16"), 40)
    views = {
        v: torch.randn(8, 3, 16, 16).to(torch.bfloat16, memory_format=torch.channels_last)
        for v in VIEWS
    }
    loss = train_step(run, Batch(torch.zeros(8, dtype=torch.long), views))
    assert loss.total.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in run.method.parameters())
    convolutions = [p for p in run.method.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)


def test_precisions_are_chosen_by_name():
    cpu = torch.device("cpu")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert {name: choose_dtype(name, cpu) for name in dtypes} == dtypes
    assert choose_dtype("auto", cpu) in (torch.float32, torch.bfloat16)


OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB of "
    "which 1.20 GiB is free. Including non-PyTorch memory, this process has 14.57 GiB in use."
)


def test_an_evaluation_that_fails_leaves_a_result_and_the_commands_to_repeat_it(
    folder, tmp_path, monkeypatch, caplog
):
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    out = tmp_path / "my run"
    monkeypatch.setattr("rsa_fast.evaluation.evaluate.linear.fast", fail)
    result = train(tiny(epochs=1, knn_every_epochs=0), folder, out)
    assert result == json.loads((out / "result.json").read_text())
    assert result["step"] > 0 and result["knn_top1"] is result["linear_top1"] is None
    assert (out / "report.html").is_file() and "Tried to allocate 2.00 GiB" in caplog.text
    monkeypatch.undo()
    commands = [line for line in caplog.text.splitlines() if line.startswith("rsa-fast eval")]
    for command, score in zip(commands, ("knn_top1", "linear_top1"), strict=True):
        done = invoke(main, *shlex.split(command)[1:])
        assert result_of(done)[score] >= 0


def test_a_gpu_without_enough_memory_is_an_error_that_says_what_helps(
    folder, tmp_path, monkeypatch
):
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    monkeypatch.setattr("rsa_fast.training.engine.train_on", fail)
    with pytest.raises(MemoryError) as caught:
        train(tiny(knn_every_epochs=0), folder, tmp_path)
    message = str(caught.value)
    assert "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB" in message
    assert "The plan for 8 images a GPU in fp32 is" in message
    assert "--set recompute_stages=" in message and "--set accumulate=2" in message


def test_one_of_several_gpus_is_used_and_said(folder, monkeypatch):
    run = build_run(tiny(), 40)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert unused_gpus(run) == ""  # on the CPU
    run.device = torch.device("cuda")
    assert unused_gpus(run) == "; one of 8 GPUs is used (--gpus auto uses all)"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert unused_gpus(run) == ""
