"""Delays planted in a made-up clock are reported exactly where they were planted.

Verdicts are tested with made-up numbers.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from rsa_fast.cli import main
from rsa_fast.insight import profiling, timeline, tuning
from rsa_fast.insight.profiling import evict, open_subject, profile, verdict
from rsa_fast.insight.timeline import PARTS, Timeline, mark_parts, peak_bytes, reset_peak
from rsa_fast.insight.tuning import tune
from rsa_fast.methods import METHODS
from rsa_fast.methods import rsa as rsa_method
from rsa_fast.pipelines import VIEWS, Batch, Loading, open_source
from rsa_fast.pipelines.native_views import NativeViews
from rsa_fast.recipes import build_recipe
from rsa_fast.training import step
from rsa_fast.training.step import build_run, train_step
from tests.fake_gpu import on_fake_gpu
from tests.helpers import invoke, result_of, write_raw_beton
from tests.tiny_runs import NARROW, set_options

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = NARROW | {
    "views.size_px": 16,
    "precision": "fp32",
    "batch_size": 8,
    "device": "cpu",
    "backend": "native",
}
HEADS = {"hidden_dim": 16, "out_dim": 8}
OWN = {
    "simclr": {"out_dim": 8},
    "moco": {"out_dim": 8, "queue_size": 16, "bn": "local"},
    "supervised": {"classes": 2},
}
OWN["infomin"] = OWN["jcl"] = OWN["moco"]
OWN["ressl"] = {**HEADS, "queue_size": 16, "bn": "local"}
OWN["inst-dis"] = OWN["pirl"] = {"out_dim": 8, "negatives": 16}
OWN["swav"] = {**HEADS, "prototypes": 10, "queue_size": 16, "queue_start_epoch": 0}
OWN["dino"] = {**HEADS, "bottleneck_dim": 4}
OWN["w-mse"] = {"hidden_dim": 16, "out_dim": 4}


def tiny(method: str, **overrides):
    return build_recipe(
        "cifar10", method, overrides={**TINY, **OWN.get(method, HEADS), **overrides}
    )


def noise(names: Iterable[str] = VIEWS) -> Batch:
    generator, views = torch.Generator().manual_seed(0), {}
    for name in names:
        shape = (8, 9, 3, 8, 8) if name.startswith("patches") else (8, 3, 16, 16)
        views[name] = torch.randn(shape, generator=generator)
    return Batch(torch.arange(8) % 2, views, torch.arange(8))


class Clock:
    """A clock that stands still except for planted delays."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def late(self, ms: float, function=lambda *_: None):
        """Return the function, delayed by `ms`."""

        def delayed(*arguments, **named):
            self.now += 1e-3 * ms
            return function(*arguments, **named)

        return delayed


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    for module in (timeline, profiling, tuning):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (
            {"step_ms": 100, "views_ms": 50, "both_ms": 101, "read_ms": 5, "decode_ms": 40},
            "compute-bound",
        ),
        # The views take hardly longer than the step.
        (
            {"step_ms": 100, "views_ms": 104, "both_ms": 104, "read_ms": 5, "decode_ms": 90},
            "compute-bound",
        ),
        # The step and the views share cores.
        (
            {"step_ms": 100, "views_ms": 50, "both_ms": 150, "read_ms": 5, "decode_ms": 40},
            "compute-bound",
        ),
        (
            {
                "step_ms": 100,
                "views_ms": 50,
                "both_ms": 150,
                "read_ms": 5,
                "decode_ms": 40,
                "overlaps": True,
            },
            "host-bound",
        ),
        (
            {
                "step_ms": 100,
                "views_ms": 50,
                "both_ms": 100,
                "read_ms": 5,
                "decode_ms": 40,
                "idle_share": 0.9,
            },
            "host-bound",
        ),
        (
            {
                "step_ms": 100,
                "views_ms": 50,
                "both_ms": 100,
                "read_ms": 5,
                "decode_ms": 40,
                "idle_share": 0.4,
            },
            "compute-bound",
        ),
        (
            {"step_ms": 50, "views_ms": 100, "both_ms": 100, "read_ms": 5, "decode_ms": 60},
            "decode-bound",
        ),
        (
            {"step_ms": 50, "views_ms": 100, "both_ms": 100, "read_ms": 60, "decode_ms": 30},
            "read-bound",
        ),
        (
            {"step_ms": 50, "views_ms": 100, "both_ms": 100, "read_ms": 5, "decode_ms": 30},
            "host-bound",
        ),
        (
            {
                "step_ms": 50,
                "views_ms": 40,
                "both_ms": 51,
                "read_ms": 5,
                "decode_ms": 30,
                "cold_views_ms": 200,
            },
            "read-bound",
        ),
        (
            {
                "step_ms": 50,
                "views_ms": 80,
                "both_ms": 80,
                "read_ms": 5,
                "decode_ms": 70,
                "cold_views_ms": 90,
            },
            "decode-bound",
        ),
        (
            {
                "step_ms": 50,
                "views_ms": 40,
                "both_ms": 51,
                "read_ms": 5,
                "decode_ms": 30,
                "cold_views_ms": 45,
            },
            "compute-bound",
        ),
    ],
)
def test_the_verdict_names_what_takes_longest(numbers, expected):
    assert verdict(**numbers) == expected


def test_delays_show_in_the_parts_they_are_planted_in_and_the_parts_add_up_to_the_step(
    clock, monkeypatch
):
    run, batch = build_run(tiny("rsa"), 40), noise()
    run.method.online.encoder.layer1.register_forward_pre_hook(clock.late(1))
    run.method.predictor[0].register_forward_pre_hook(clock.late(0.5))
    run.method.target.encoder.layer1.register_forward_pre_hook(clock.late(10))
    run.method.online.encoder.conv1.weight.register_post_accumulate_grad_hook(clock.late(1000))
    for module, name, ms in (
        *((rsa_method, "distance", 100), (sys.modules["torch.optim.sgd"], "_fused_sgd", 2000)),
        *((torch, "_foreach_lerp_", 3000), (step, "set_learning_rate", 4000)),
    ):
        monkeypatch.setattr(module, name, clock.late(ms, getattr(module, name)))
    watch = Timeline(run.device)
    with mark_parts(run, watch):
        ms, steps = watch.time(train_step(run, batch) for _ in range(2))
    # Online and target networks run twice in a step, and the distance is computed four times.
    planted = {
        "forward_online": 3,
        "forward_target": 20,
        "loss": 400,
        "backward": 1000,
        "optimiser": 2000,
        "ema": 3000,
    }
    assert ms == pytest.approx(planted | {"other": 4000}) and ms.keys() == set(PARTS)
    assert steps == 2 and sum(ms.values()) == pytest.approx(1e3 * clock.now / 2)


@pytest.mark.parametrize("method", METHODS)
def test_watching_changes_nothing_in_a_step_and_ends(method):
    plain, seen = (build_run(tiny(method), 40) for _ in range(2))
    batch = noise(sorted(plain.method.reads))
    watch = Timeline(torch.device("cpu"))
    with mark_parts(seen, watch):
        parts, _ = watch.time(train_step(seen, batch) for _ in range(2))
    train_step(plain, batch)
    train_step(plain, batch)
    assert all(
        map(torch.equal, plain.method.state_dict().values(), seen.method.state_dict().values())
    )
    assert ("forward_target" in parts) == (
        method in ("rsa", "byol", "simsiam-rsa", "moco", "ressl", "jcl", "infomin", "dino")
    )
    assert set(parts) >= {"forward_online", "loss", "backward", "optimiser", "ema", "other"}
    marks = len(watch.marks)
    train_step(seen, batch)
    assert len(watch.marks) == marks


def plant(clock: Clock, monkeypatch, step_ms, view_ms: float = 1.0) -> Counter:
    """Plant steps that take `step_ms(run, steps before)` and batches that take `view_ms`.

    Return the number of steps by method, which counts up.
    """
    calls: Counter[str] = Counter()

    def step(run, *_):
        clock.late(step_ms(run, calls[run.recipe.method]))()
        calls[run.recipe.method] += 1

    def steps(run, batches):
        while len(list(islice(batches, run.recipe.accumulate))) == run.recipe.accumulate:
            yield step(run)

    def batches(self, epoch, step=0, made=NativeViews.batches):
        for batch in made(self, epoch, step):
            yield clock.late(view_ms, lambda made: made)(batch)

    monkeypatch.setattr(profiling, "train_step", step)
    monkeypatch.setattr(profiling, "train_steps", steps)
    monkeypatch.setattr(NativeViews, "batches", batches)
    return calls


def test_figures_verdict_and_knob_are_those_of_the_planted_step_and_loader(
    folder, clock, monkeypatch
):
    plant(clock, monkeypatch, lambda run, _: 10 if run.recipe.method == "rsa" else 50, view_ms=30)
    # Some file systems keep files in the page cache.
    monkeypatch.setattr(profiling, "evict", lambda files: "")
    report = profile({"rsa": tiny("rsa"), "byol": tiny("byol")}, folder, repeats=2, seconds=0.2)
    rsa, byol = report["methods"]["rsa"], report["methods"]["byol"]
    assert [rsa[f"{mode}_ms"] for mode in ("step", "views", "both", "cold_views")] == pytest.approx(
        [10, 30, 40, 30]
    )
    assert (rsa["stall_share"], rsa["verdict"]) == (pytest.approx(3 / 4), "host-bound")
    assert (byol["stall_share"], byol["verdict"]) == (pytest.approx(3 / 8), "compute-bound")
    assert "prefetch_batches" in rsa["knob"] and "same cores" in byol["knob"]
    assert rsa["images_per_s"] == pytest.approx(8 / 0.040)
    assert rsa["over_byol"] == pytest.approx({"step": 1 / 5, "views": 1, "both": 1 / 2})
    assert report["rsa_over_byol"] == rsa["over_byol"]["both"]


def test_the_verdict_read_bound_points_at_blocks_where_they_pay(
    folder, tmp_path, clock, monkeypatch
):
    plant(clock, monkeypatch, lambda run, _: 10, view_ms=30)
    monkeypatch.setattr(profiling, "evict", lambda files: "")
    monkeypatch.setattr(profiling, "verdict", lambda **times: "read-bound")
    packed = write_raw_beton(tmp_path, 16, 40)

    def measured(data, memory_bytes: float, **fields) -> dict:
        monkeypatch.setattr(profiling, "read_memory_bytes", lambda: memory_bytes)
        report = profile({"rsa": tiny("rsa", **fields)}, data, repeats=1, seconds=0.1)
        return report["methods"]["rsa"]

    assert measured(packed, 1e3, backend="native")["knob"].startswith("order=blocks, which reads")
    assert measured(packed, 1e9, backend="native")["knob"].startswith("few large files")
    assert "with order=blocks" in measured(folder, 1e3, backend="native")["knob"]
    blocks = measured(packed, 1e3, backend="native", order="blocks")
    assert blocks["knob"].startswith("few large files")
    assert "order = blocks reads windows ahead" in blocks["cold_fault"]
    assert blocks["cold_views_ms"] is None


def test_a_step_that_accumulates_waits_for_the_views_of_all_its_passes(folder, clock, monkeypatch):
    plant(clock, monkeypatch, lambda *_: 10, view_ms=30)
    monkeypatch.setattr(profiling, "evict", lambda files: "")
    report = profile({"rsa": tiny("rsa", accumulate=2)}, folder, repeats=2, seconds=0.4)
    rsa = report["methods"]["rsa"]
    assert [rsa[f"{mode}_ms"] for mode in ("step", "views", "both", "cold_views")] == pytest.approx(
        [10, 60, 70, 60]
    )
    assert rsa["images_per_s"] == pytest.approx(8 / 0.070)


def test_a_slow_decoder_is_decode_bound_and_its_time_is_the_decode_stage(
    folder, clock, monkeypatch
):
    plant(clock, monkeypatch, lambda *_: 1)
    monkeypatch.setattr(NativeViews, "decode", clock.late(4, NativeViews.decode))
    report = profile({"rsa": tiny("rsa", threads=1)}, folder, repeats=1, seconds=0.5)
    assert (
        report["methods"]["rsa"]["verdict"] == "decode-bound"
        and report["methods"]["rsa"]["over_byol"] is None
    )
    assert report["stages_us"] == pytest.approx(
        {"read": 0, "decode": 4000, "crop": 0, "aggressive": 0}
    )


def test_slow_first_steps_leave_no_trace(folder, clock, monkeypatch):
    # Two of them come before anything is timed, the others belong to the first turn.
    calls = plant(clock, monkeypatch, lambda _, before: 500 if before < 4 else 10)
    report = profile({"rsa": tiny("rsa")}, folder, repeats=2, seconds=0.04)["methods"]["rsa"]
    assert report["range_ms"]["step"] == pytest.approx([10, 10]) and report["range_ms"][
        "both"
    ] == pytest.approx([11, 11])
    assert calls["rsa"] > 12


def test_on_a_machine_that_slows_down_methods_are_compared_turn_by_turn(folder, clock, monkeypatch):
    plant(clock, monkeypatch, lambda *_: 5 + 10 * clock.now)
    recipes = {"byol": tiny("byol"), "again": tiny("byol")}
    report = profile(recipes, folder, repeats=5, seconds=0.02)["methods"]
    assert report["byol"]["range_ms"]["step"][1] > 1.5 * report["byol"]["range_ms"]["step"][0]
    assert report["again"]["over_byol"]["step"] == pytest.approx(1, abs=0.15)


def test_a_method_is_measured_with_the_views_it_reads_and_no_others(folder):
    source = open_source(folder, "pretrain")
    for method, views in (("byol", VIEWS[2:]), ("rsa", VIEWS)):
        with open_subject(tiny(method), source) as subject:
            assert subject.loader.job.reads == subject.ready[0].views.keys() == set(views)


def test_cold_views_are_those_of_files_dropped_just_before_each_read_once(folder, monkeypatch):
    dropped, read = [], []
    monkeypatch.setattr(
        profiling, "evict", lambda files: dropped.append(files) or read.clear() or ""
    )
    monkeypatch.setattr(
        NativeViews,
        "decode",
        lambda self, i, decode=NativeViews.decode: read.append(i) or decode(self, i),
    )
    with open_subject(
        tiny("byol", threads=1), source := open_source(folder, "pretrain")
    ) as subject:
        for _ in range(2):
            subject.measure(0.0)
            files = [folder / source.manifest.paths[i] for i in read]
            assert len(set(dropped[-1])) == 40 and set(dropped[-1]) == set(files[:40])
        assert len(subject.times("cold_views")) == 1
        monkeypatch.setattr(profiling, "evict", lambda files: "they stay")
        subject.measure(0.0)
        assert subject.cold_fault == "they stay" and subject.times("cold_views") == []


def in_page_cache(path: Path) -> bool:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        pages = (ctypes.c_ubyte * -(-len(memory) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(memory)
        assert (
            ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(len(memory)), pages) == 0
        )
        del start
    return any(page & 1 for page in pages)


def test_evicted_files_leave_the_page_cache_and_one_that_stays_is_found(tmp_path):
    files = [tmp_path / str(i) for i in range(10)]
    for path in files:
        path.write_bytes(os.urandom(50_000))
    assert all(map(in_page_cache, files))
    if "does not report" in (fault := evict(files)):
        pytest.skip(fault)
    assert fault == "" and not any(map(in_page_cache, files[1:]))  # The first was looked at.
    with files[1].open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        assert len(bytes(memory)) == 50_000  # Pages in use stay.
        assert evict(files[1:]) == "1 of 1 files stay in the page cache"


def test_peak_memory_of_a_process_is_forgotten_and_found_again():
    def use(size: int) -> None:
        """Memory straight from the system, which a long process could otherwise have in stock."""
        with mmap.mmap(-1, size) as memory:
            for _ in range(size // 2**20):
                memory.write(bytes(2**20))

    here = torch.device("cpu")
    use(320 * 2**20)
    reset_peak(here)
    low = peak_bytes(here)
    use(160 * 2**20)
    assert 140e6 < peak_bytes(here) - low < 200e6


def command(*words: object):
    sets = set_options(TINY | {"out_dim": 8})
    return invoke(main, "profile", "--dataset", "cifar10", *sets, *words)


def test_the_command_reports_a_table_a_page_a_trace_and_json(folder, tmp_path):
    files = ("--trace", tmp_path / "made" / "trace.json", "--html", tmp_path / "new" / "page.html")
    done = command("--data", folder, "--repeats", 1, "--seconds", 0, *files)
    report = result_of(done)
    assert report["rsa_over_byol"] > 0 and report["stages_us"].keys() == {
        "read",
        "decode",
        "crop",
        "aggressive",
    }
    for method in report["methods"].values():
        assert sum(method["parts_ms"].values()) == pytest.approx(method["step_ms"], rel=1e-9)
        assert (
            method["loading"]["backend"] == "native"
            and method["loading"]["aggressive_on"] == "host"
        )
        assert (
            method["images_per_s"] == pytest.approx(8000 / method["both_ms"])
            and method["peak_gib"] > 0
        )
    events = json.loads((tmp_path / "made" / "trace.json").read_text())["traceEvents"]
    names = Counter(event.get("name") for event in events)
    assert names["rsa step"] == names["byol step"] == 3 and names["aten::convolution"] > 100
    page = (tmp_path / "new" / "page.html").read_text()
    assert not any(tag in page for tag in ("<script", "<link", "<img", "http"))
    for method in report["methods"].values():
        step = f"{method['step_ms']:.2f}"
        assert step in done.stdout and step in page
    # The width of each piece of a bar is its part of the longest bar.
    pieces = re.findall(r'<i style="width:([\d.]+)%[^"]*" title="([^:]*): ([\d.]+) ms"', page)
    parts = [part.replace("_", " ") for part in PARTS] + ["added by the views"]
    assert [name for _, name, _ in pieces] == 2 * parts
    wanted = [
        ms
        for method in report["methods"].values()
        for ms in (
            *(method["parts_ms"][part] for part in PARTS),
            max(0.0, method["both_ms"] - method["step_ms"]),
        )
    ]
    assert [float(ms) for *_, ms in pieces] == pytest.approx(wanted, abs=0.006)
    longest = max(sum(wanted[: len(parts)]), sum(wanted[len(parts) :]))
    widths = [float(width) for width, *_ in pieces]
    assert widths == pytest.approx([100 * ms / longest for ms in wanted], abs=0.001)


def test_the_command_prints_only_json_when_told_to(folder):
    done = command(
        "--data", folder, "--methods", "simclr", "--repeats", 1, "--seconds", 0, "--json"
    )
    report = json.loads(done.stdout)
    assert (
        report.keys() >= {"device", "dtype", "batch_size", "repeats"}
        and "rsa_over_byol" not in report
    )
    assert (
        report["methods"]["simclr"]["over_byol"] is None
        and report["methods"]["simclr"]["parts_ms"]["forward_target"] == 0
    )


class Planted:
    """A loader whose batches take the time planted for its settings."""

    def __init__(self, clock: Clock, loading: Loading) -> None:
        self.job = SimpleNamespace(loading=loading)
        settings = (loading.backend, loading.threads, loading.aggressive_on)
        ms = {2: 2, 4: 1}[loading.prefetch_batches] if settings == ("native", 1, "device") else 5
        self.wait = clock.late(ms)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def batches(self, _: int):
        while True:
            yield self.wait()


def test_tuning_finds_the_planted_fastest_settings_and_training_takes_them(
    folder, tmp_path, clock, monkeypatch
):
    def open_loader(run, source, loading):
        if loading.backend == "resident":
            raise ValueError("not on this machine")
        return Planted(clock, loading)

    monkeypatch.setattr(tuning, "open_loader", open_loader)
    monkeypatch.setattr(tuning, "train_steps", lambda run, batches: batches)
    result = tune(tiny("rsa", aggressive_on="host"), folder, tmp_path / "tuned.yaml", budget_s=20)
    fastest = {
        "backend": "native",
        "threads": 1,
        "prefetch_batches": 4,
        "aggressive_on": "device",
        "decode_on": "gpu",
    }
    fastest |= {"on_bad_image": "stop"}  # the recipe's own setting
    assert result["settings"] == fastest and result["over_own"] == pytest.approx(5)
    assert (
        result["images_per_s"] == pytest.approx(8000) and 5 < result["tried"] < result["candidates"]
    )
    assert clock.now < 25
    assert yaml.safe_load((tmp_path / "tuned.yaml").read_text()) == {
        "dataset": "cifar10",
        "method": "rsa",
        **fastest,
    }
    plain = build_recipe("cifar10", "rsa").model_dump()
    assert build_recipe("cifar10", "rsa", tmp_path / "tuned.yaml").model_dump() == plain | fastest


def test_tuning_on_a_gpu_tries_native_and_dali_by_turns_with_both_of_dali_s_decoders(
    folder, monkeypatch
):
    monkeypatch.setattr(tuning, "choose_backend", lambda source, device: ("dali", ""))
    # DALI is installed, FFCV is not.
    monkeypatch.setattr("rsa_fast.pipelines.backends.find_spec", lambda name: name != "ffcv")
    source = open_source(folder, "pretrain")
    settings = tuning.candidates(Loading(), source, torch.device("cuda"))
    backends = [loading.backend for loading in settings]
    fewer = min(backends.count("native"), backends.count("dali"))
    for turn in range(fewer):
        assert set(backends[2 * turn : 2 * turn + 2]) == {"native", "dali"}
    dali = [loading for loading in settings if loading.backend == "dali"]
    assert {loading.decode_on for loading in dali} == {"gpu", "cpu"}
    # host would bring the crops back from the GPU.
    assert {loading.aggressive_on for loading in dali} == {"device"}


def test_the_command_tunes_in_no_time_and_train_takes_what_it_writes(folder, tmp_path):
    out = tmp_path / "new" / "tuned.yaml"
    done = command("--data", folder, "--tune", "--budget-s", 0, "--out", out)
    result = result_of(done)
    assert result["tried"] == 1 < result["candidates"] and result["over_own"] == 1
    words = (
        "train",
        "--data",
        folder,
        "--config",
        out,
        "--batch-size",
        8,
        "--dry-run",
        "--out",
        tmp_path / "run",
    )
    train = invoke(main, *words)
    assert train.exit_code == 0 and "backend: native" in train.output


WITHOUT_SYNC = """
import json, sys, torch
from pathlib import Path
from rsa_fast.insight.profiling import profile
from rsa_fast.recipes import build_recipe
from rsa_fast.insight.timeline import Timeline

def time_without_sync(self, *arguments, time=Timeline.time):
    torch.cuda.set_sync_debug_mode("error")
    try:
        return time(self, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")

Timeline.time = time_without_sync
fields = {"device": "cuda", "batch_size": 8, "width": 8, "views.size_px": 16, "backend": "native"}
recipes = {method: build_recipe("cifar10", method, overrides=fields) for method in ("byol", "rsa")}
for names in (("byol", "rsa"), ("rsa",)):
    chosen = {name: recipes[name] for name in names}
    report = profile(chosen, Path(sys.argv[1]), repeats=1, seconds=0)
    print(json.dumps(report["methods"]["rsa"]))
"""


def test_nothing_waits_for_a_gpu_while_it_is_timed(folder):
    together, alone = map(json.loads, on_fake_gpu("-c", WITHOUT_SYNC, folder).splitlines())
    # Every pair of events is a millisecond apart there, so the parts count how often each began.
    counts = {"forward_online": 4, "forward_target": 2, "backward": 1, "optimiser": 1, "ema": 1}
    assert {part: alone["parts_ms"][part] for part in counts} == pytest.approx(counts)
    # The peak does not include what the other method keeps.
    assert together["peak_gib"] == pytest.approx(alone["peak_gib"], rel=0.02)
