"""`make gpu-report`: the shares of time, faults and stops, the table, and single measurements."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rsa_fast.insight import planning
from rsa_fast.recipes import build_recipe
from rsa_fast.tools.gpu_report import __main__ as gpu_report
from rsa_fast.tools.gpu_report import checks, inputs, loops
from rsa_fast.tools.gpu_report.__main__ import Part, share_of
from rsa_fast.tools.gpu_report.predictions import predict
from rsa_fast.tools.gpu_report.table import MAX_ROWS, as_markdown, thinned
from rsa_fast.tools.gpu_report.worker import Settings, SkippedError
from tests.helpers import DALI, ROOT
from tests.tiny_runs import NARROW

SIZE = {"size": "{size:.1f}"}


def planted(name: str, share: float = 1.0) -> Part:
    return Part(
        name=name,
        share=share,
        place=f"tests.tools.planted_parts:{name}",
        title=f"The {name} part",
        columns=SIZE,
    )


def run(monkeypatch, tmp_path: Path, *parts: Part, minutes: float = 1.0) -> tuple[int, dict]:
    """Return the exit code and the JSON of a report of planted parts."""
    monkeypatch.setattr(gpu_report, "PARTS", parts)
    out = tmp_path / "gpu.json"
    code = gpu_report.main(["--out", str(out), "--minutes", str(minutes), "--repeats", "2"])
    return code, json.loads(out.read_text())["parts"]


def test_shares_divide_what_is_left_and_unused_time_passes_on():
    shares, left_s, given = [1, 1, 2], 100.0, []
    for number, used_s in enumerate((5.0, 60.0, 0.0)):  # less than its share, more than its share
        given.append(share_of(shares[number:], left_s))
        left_s -= used_s
    assert given == [pytest.approx(s) for s in (100 / 4, 95 / 3, 35)]
    assert share_of([2, 1], -3.0) == 0


def test_a_fault_is_recorded_and_everything_else_is_measured(monkeypatch, tmp_path, capfd):
    names = ("sound", "faulty", "impossible", "ours", "skipping", "too_large", "dying")
    code, parts = run(monkeypatch, tmp_path, *map(planted, names))
    assert code == 1 and list(parts) == list(names)
    states = {name: record["state"] for name, record in parts.items()}
    faults = dict.fromkeys(("faulty", "impossible", "ours", "dying"), "fault")
    assert states == {"sound": "ran", **faults, "skipping": "skipped", "too_large": "ran"}

    sound = {case: row["size"] for case, row in parts["sound"]["rows"].items()}
    assert sound == {"one": 2, "two": 1.0, "three": None}  # JSON has no infinity.
    half, whole = parts["faulty"]["rows"].values()
    assert half["size"] == 4 and half["fault"]["type"] == "KeyError" and whole["size"] == 5
    assert "planted_parts.py" in half["fault"]["traceback"]
    assert parts["impossible"]["fault"]["message"] == "in the part itself"
    assert "gpu_nothing" in parts["ours"]["fault"]["message"]
    reasons = {case: row["skipped"] for case, row in parts["skipping"]["rows"].items()}
    missing = "No module named 'a_library_that_is_not_there'"
    assert reasons == {"library": missing, "backend": missing, "reason": "the card has none"}
    assert parts["too_large"]["rows"]["large"]["note"] == "does not fit in the GPU's memory"
    assert parts["dying"]["fault"]["message"] == "its process ended with exit code 3"
    assert parts["dying"]["under_way"] == "last" and not parts["dying"]["rows"]
    table = (tmp_path / "gpu.md").read_text()
    assert capfd.readouterr().out.strip() == table.strip()
    assert "| half | 4.0 | KeyError: 'no such view' |" in table


def test_a_part_stops_when_its_share_is_over_and_a_stuck_one_is_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_report, "GRACE_S", 0.5)
    parts = (planted("slow", 1), planted("hanging", 1), planted("sound", 8))
    began = time.monotonic()
    code, found = run(monkeypatch, tmp_path, *parts, minutes=0.5)
    assert code == 1 and time.monotonic() - began < 45
    slow = found["slow"]
    measured = len(slow["rows"])
    assert slow["state"] == "ran" and 1 <= measured <= 10  # It has 3 s, and each nap takes .3 s.
    assert slow["left_out"] == [f"nap {number}" for number in range(measured, 1000)]
    assert found["hanging"]["fault"]["type"] == "TimeoutError"
    assert found["hanging"]["under_way"] == "stuck" and found["sound"]["state"] == "ran"


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_a_stop_in_the_middle_loses_only_the_measurement_under_way(tmp_path, number):
    program = """
import sys
from rsa_fast.tools.gpu_report import __main__ as gpu_report
place = "tests.tools.planted_parts:stopped"
part = gpu_report.Part("stopped", 1, place, "A title", {"size": "{size}"})
gpu_report.PARTS = (part,)
gpu_report.main(["--out", sys.argv[1]])
"""
    out = tmp_path / "gpu.json"
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", program, str(out)], env=env) as process:
        table = out.with_suffix(".md")  # It is written after the JSON.
        while not (table.is_file() and table.read_text().endswith("- long: was still running\n")):
            time.sleep(0.1)
            assert process.poll() is None
        process.send_signal(number)
    assert process.returncode == -number
    record = json.loads(out.read_text())["parts"]["stopped"]
    assert record["state"] == "running" and record["under_way"] == "long"
    assert record["rows"]["done"]["size"] == 8
    worker, ends_at = Path(f"/proc/{record['rows']['done']['pid']}"), time.monotonic() + 10
    while worker.exists() and time.monotonic() < ends_at:
        time.sleep(0.1)
    assert not worker.exists()  # The GPU is free again.


MACHINE = {
    "case": "machine",
    "name": "NVIDIA X",
    "total_gib": 31.75,
    "context_gib": 0.5,
    "capability": "7.0",
    "plan_row": None,
    "smi": {"driver": "570.1", "power limit, W": "300"},
    "versions": {"Python": "3.12.1", "torch": "2.10.0"},
    "cpu": "CPU Y",
    "cores": 8,
    "memory_gib": 60.2,
}
TABLE = """\
### NVIDIA X, 2030-01-02 03:04 UTC

- Card: 31.75 GiB, of which CUDA takes 0.50 itself, compute capability 7.0, driver 570.1, \
power limit, W 300
- `plan`: has no figures for this card and predicts no times
- Versions: Python 3.12.1, torch 2.10.0
- Host: 8 cores of CPU Y, 60 GiB

**First**

|  | size, px | rate | note |
| --- | --- | --- | --- |
| a | 1.5 | 2,000 |  |
| b |  | 3 | a \\| b c |

- c; d: skipped: no card
- e: ValueError: bad
- f; g: left out, because the part's time was over

**Second**

- skipped: no GPU

**Third**

- nothing was measured

**Fourth**

- TimeoutError: killed
- h: was still running
"""


def test_the_table_of_a_report_is_this_markdown():
    first = [
        {"case": "a", "size": 1.52, "rate": 2000.4, "unseen": 3},
        {"case": "b", "size": None, "rate": 3.0, "note": "a | b\n c"},
        {"case": "c", "skipped": "no card"},
        {"case": "d", "skipped": "no card"},
        {"case": "e", "fault": {"type": "ValueError", "message": "bad", "traceback": "long"}},
    ]
    killed = {"type": "TimeoutError", "message": "killed", "traceback": ""}
    parts = {
        "machine": {"title": "Machine", "rows": {"machine": MACHINE}},
        "1": {
            "title": "First",
            "rows": {row["case"]: row for row in first},
            "left_out": ["f", "g"],
        },
        "2": {"title": "Second", "rows": {}, "skipped": "no GPU"},
        "3": {"title": "Third", "rows": {}, "left_out": []},
        "4": {"title": "Fourth", "rows": {}, "fault": killed, "under_way": "h"},
    }
    columns = {"size, px": "{size:.1f}", "never": "{never}", "rate": "{rate:,.0f}"}
    report = {"date": "2030-01-02 03:04 UTC", "parts": parts}
    assert as_markdown(report, dict.fromkeys("1234", columns)) == TABLE


@pytest.mark.parametrize("count", [0, 1, MAX_ROWS, MAX_ROWS + 1, 1000])
def test_a_long_table_keeps_its_ends_and_its_order(count):
    rows = [{"case": str(number)} for number in range(count)]
    kept = [int(row["case"]) for row in thinned(rows)]
    assert len(kept) == min(count, MAX_ROWS) and kept == sorted(set(kept))
    assert not count or (kept[0], kept[-1]) == (0, count - 1)
    assert count > MAX_ROWS or kept == list(range(count))


TINY = NARROW | {"hidden_dim": 16, "views.size_px": 16, "batch_size": 8}


def tiny_row(**fields) -> dict:
    overrides = TINY | {"precision": "fp16"} | fields
    return {
        "recipe": build_recipe("imagenet1k", "rsa", overrides=overrides).model_dump(mode="json")
    }


def test_predictions_are_the_planner_s_and_their_error_is_against_what_was_measured(monkeypatch):
    monkeypatch.setattr(planning, "decode_images_per_s", lambda *_: 500.0)
    monkeypatch.setattr(planning, "efficiency", lambda *_: (0.25, "given"))
    card, row = "v100-32g", tiny_row()
    recipe = build_recipe(
        "imagenet1k", "rsa", overrides=TINY | {"precision": "fp16", "bn": "local"}
    )
    ledger, _ = planning.trace(recipe, 8, "fp16")
    gib = ledger.peak_bytes / 2**30
    found = predict("memory", row | {"allocated_gib": gib / 1.25}, None)
    assert found == {"predicted_gib": gib, "error_pct": pytest.approx(25)}
    assert predict("memory", row, None) == {"predicted_gib": gib}  # The batch did not fit.

    roofline_ms = sum(ledger.roofline_ms(planning.GPUS[card], "fp16"))
    launches_ms = len(ledger.operations) * planning.LAUNCH_US / 1e3
    found = predict("step", row | {"step_ms": 2 * roofline_ms}, card)
    assert found["roofline_share"] == pytest.approx(0.5)
    assert found["predicted_ms"] == pytest.approx(max(roofline_ms / 0.25, launches_ms))

    loop = {"images_per_s": 400.0, "threads": 3}
    rate = predict("loop", tiny_row(backend="native") | loop, card)["predicted_per_s"]
    assert rate == pytest.approx(min(3 * 500.0, 8e3 / launches_ms))
    for unknown in (tiny_row(backend="dali"), tiny_row(compile=True)):
        assert predict("loop", unknown | loop, card) == {}
    assert predict("step", row | {"step_ms": 1.0}, None) == {}


def settings(tmp_path: Path, **fields) -> Settings:
    values = {"data": None, "batch_sizes": (2,), "images": 6, "repeats": 2, "overrides": {}}
    return Settings(scratch=tmp_path, **(values | fields))


def test_views_are_compared_with_pil_s(tmp_path, monkeypatch):
    """On a CPU the views of the native backend's host stages equal PIL's."""
    for module in (inputs, checks):
        monkeypatch.setattr(module, "gpu", lambda: torch.device("cpu"))
    oracle, small = checks.pil_views, settings(tmp_path, overrides={"views.size_px": 40})

    def compared() -> dict:
        cases = {case.name: case for case in checks.values(small)}
        (row,) = cases["native, all on the host"].work(1.0)
        return row

    row = compared()
    assert row.pop("images") == 6 and len(row) == 4 and max(row.values()) < 0.01

    def one_level_off(settings: Settings) -> dict:
        return {name: view + np.uint8(name == "weak_2") for name, view in oracle(settings).items()}

    monkeypatch.setattr(checks, "pil_views", one_level_off)
    assert compared()["weak_mean"] == pytest.approx(0.5, abs=0.01)


def test_the_tests_that_need_a_gpu_are_counted(tmp_path, monkeypatch):
    assert (checks.ROOT / checks.TESTS).is_file()
    tests = tmp_path / "test_planted.py"
    tests.write_text(PLANTED_TESTS)
    monkeypatch.setattr(checks, "TESTS", tests)
    (row,) = checks.run_tests(1.0)
    assert row == {"tests": 4, "passed": 2, "note": "failed: test_bad"}
    monkeypatch.setattr(checks, "TESTS", tmp_path / "nothing.py")
    with pytest.raises(checks.SkippedError, match=r"nothing\.py: run this in a checkout"):
        next(checks.run_tests(1.0))


PLANTED_TESTS = """
import pytest

@pytest.mark.parametrize("number", [1, 2])
def test_good(number):
    assert number

def test_bad():
    assert not "good"

@pytest.mark.skip
def test_elsewhere():
    assert False
"""


def test_the_largest_gap_is_that_of_a_loop_over_all_values():
    nan, inf = float("nan"), float("inf")
    one = {"w": torch.tensor([1.0, nan, 3.0, inf]), "n": torch.tensor(4)}
    assert loops.largest_gap(one, {name: values.clone() for name, values in one.items()}) == 0
    other = {"w": torch.tensor([1.5, nan, 2.75, inf]), "n": torch.tensor(4)}
    assert loops.largest_gap(one, other) == 0.5
    assert loops.largest_gap(one, other | {"n": torch.tensor(6)}) == 2


@DALI
def test_dali_is_skipped_where_it_cannot_use_a_gpu():
    if torch.cuda.is_available():
        inputs.check_dali()
    else:
        with pytest.raises(SkippedError, match="DALI cannot use this GPU: "):
            inputs.check_dali()


def test_facts_of_the_first_gpu_come_from_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert inputs.nvidia_smi() == {}
    program = tmp_path / "nvidia-smi"
    answer = "#!/bin/sh\necho '570.1, 300.00, 1230, 1530, 877'\necho '570.1, 250.00, 1, 2, 3'\n"
    program.write_text(answer)
    program.chmod(0o755)
    names = ("driver", "power limit, W", "SM clock, MHz", "highest SM clock, MHz")
    facts = dict(zip(names, ("570.1", "300.00", "1230", "1530"), strict=True))
    assert inputs.nvidia_smi() == facts | {"memory clock, MHz": "877"}
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert inputs.nvidia_smi() == {}


def test_a_batch_is_halved_until_it_fits():
    tried = []

    def work(batch_size: int) -> str:
        tried.append(batch_size)
        if batch_size > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return f"{batch_size} fit"

    assert inputs.largest_that_fits(100, work) == "12 fit" and tried == [100, 50, 25, 12]
    with pytest.raises(torch.OutOfMemoryError):
        inputs.largest_that_fits(1, lambda batch_size: work(21))
