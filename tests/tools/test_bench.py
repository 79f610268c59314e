"""The benchmarks run and report what the README says they do; their figures are not tested."""

from __future__ import annotations

import json
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from rsa_fast.pipelines import Loader
from rsa_fast.pipelines.views import view_name
from rsa_fast.tools import bench
from rsa_fast.tools.bench import main, median_ratio
from tests.helpers import invoke, result_of


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (
            ("views", "--batch-size", "8", "--turns", "1"),
            {"resident_host_ratio", "resident_device_ratio", "draw_ms"},
        ),
        (
            ("step", "--width", "4", "--batch-size", "8", "--turns", "1"),
            {
                "loop_efficiency",
                "rsa_over_byol",
                "bf16_channels_last_speedup",
                "step_ms",
                "images_per_s",
            },
        ),
    ],
)
def test_the_last_line_is_one_json_object(arguments, keys):
    figures = result_of(invoke(main, *arguments))
    assert keys <= figures.keys() and all(value > 0 for value in figures.values())


def test_ratios_pair_measurements_of_the_same_turn():
    assert median_ratio([2.0, 20.0, 4.0], [1.0, 10.0, 1.0]) == 2  # A slow turn slows both.


FILES = pytest.mark.skipif(
    not (find_spec("ffcv") and find_spec("nvidia.dali")), reason="needs FFCV and DALI: make setup"
)


PEER_S = 1e-2  # the time of one image by a transform of another project in the tests below
DECODE_S = 1e-3  # the time of one image's decoding in the tests below
PIXEL_S = {"torchvision": 8e-6, "native": 2e-6, "ffcv": 1e-6, "dali": 4e-6}  # of a view's pixel


def image_s(loader: Loader) -> float:
    """The time of one image: its decoding, and the pixels of the views that are read of it."""
    job = loader.job
    pixels = sum(
        job.spec.crops[crop].size_px ** 2
        for crop in job.crops
        for kind in ("weak", "aggressive")
        if view_name(kind, crop) in job.reads
    )
    return DECODE_S + PIXEL_S[job.loading.backend] * pixels


@FILES
def test_backends_are_compared_by_the_views_that_each_makes(folder, monkeypatch):
    """The loaders are real. Their speeds are those of a machine on which the results are known."""

    def speed(loader: object, **_: object) -> tuple[float, float]:
        batch_s = 8 * (image_s(loader) if isinstance(loader, Loader) else PEER_S)
        return 1 / batch_s, batch_s

    monkeypatch.setattr(Loader, "batches", lambda loader, epoch: loader)
    monkeypatch.setattr(bench, "speed_of", speed)
    monkeypatch.setattr(bench, "decoding_speed", lambda *_: (1 / DECODE_S, 2 * DECODE_S))
    words = f"backends --data {folder} --size 16 --batch-size 8 --turns 1 --seconds 0.05"
    result = invoke(main, *words.split())
    figures = result_of(result)
    views_s = {backend: cost * 4 * 16**2 for backend, cost in PIXEL_S.items()}
    slowest = DECODE_S + views_s["torchvision"]
    wanted = {
        "native_ratio": slowest / (DECODE_S + views_s["native"]),
        "ffcv500_ratio": slowest / (DECODE_S + views_s["ffcv"]),
        "ffcv_passthrough_ratio": slowest / (DECODE_S + views_s["ffcv"]),
        "dali_cpu_ratio": slowest / (DECODE_S + views_s["dali"]),
        "dali_cpu_weak_ratio": slowest / (DECODE_S + views_s["dali"] / 2),
        "native_of_decode_limit": DECODE_S / (DECODE_S + views_s["native"]),
        "multi_crop_pixel_cost": 1.0,  # a pixel costs the same in every view here
    }
    assert {name: figures[name] for name in wanted} == pytest.approx(wanted, rel=1e-3)
    assert figures["decode_simplejpeg_cpu_ms"] == pytest.approx(2e3 * DECODE_S)
    one_view_s = DECODE_S + PIXEL_S["native"] * 16**2
    assert figures["native_one_view_cpu_ms"] == pytest.approx(1e3 * one_view_s)
    of_lightly = {name: value for name, value in figures.items() if "over_lightly" in name}
    assert len(of_lightly) == 2 * bool(find_spec("lightly"))
    if of_lightly:
        byol_s = DECODE_S + views_s["native"] / 2
        assert of_lightly["native_over_lightly_byol"] == pytest.approx(PEER_S / byol_s, rel=1e-3)


def test_the_limit_of_decoding_counts_the_images_of_both_threads(folder):
    files = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))[:3]]
    decoded: list[int] = []
    per_s, cpu_s = bench.decoding_speed(
        [*files, b"no JPEG"], lambda jpeg: decoded.append(len(jpeg)), seconds=0.02
    )
    assert per_s == len(decoded) / 0.02 and set(decoded) == set(map(len, files))
    assert 0 < cpu_s < 0.1


class Clock:
    """A meter that reports the step times of three turns, one of them on a busy machine."""

    times = iter([2.0, 1.0] * 3 + [20.0, 10.0] * 3 + [8.0, 2.0] * 3)  # RSA and BYOL, by backend
    began = 0.0

    def __init__(self, *_: object) -> None: ...

    def waiting(self, batches):
        return batches

    def restart(self) -> None: ...

    def read(self) -> dict[str, float]:
        return {"step_ms": next(self.times), "wait_pct": 25.0}


@pytest.mark.slow
@FILES
def test_rsa_and_byol_train_on_every_file_backend(folder, monkeypatch):
    monkeypatch.setattr(bench, "Meter", Clock)
    words = (
        f"training --data {folder} --arch resnet18 --size 16 --batch-size 8 --turns 3 --seconds 0"
    )
    result = invoke(main, *words.split())
    figures = result_of(result)
    for backend in ("native", "dali", "ffcv"):
        names = ("rsa_step_ms", "byol_step_ms", "rsa_over_byol", "rsa_wait_pct")
        # The ratio is the median over the turns, and not the ratio of the medians, which is 4.
        assert [figures[f"{backend}_{name}"] for name in names] == [8, 2, 2, 25]


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_all_of_them_end_in_one_json_object(monkeypatch, option):
    def measured(command: list[str], **_) -> SimpleNamespace:
        context = main.commands[command[3]].make_context(command[3], command[4:])
        return SimpleNamespace(stdout=f'table of {context.info_name}\n{{"ratio": 1.5}}\n')

    monkeypatch.setattr("subprocess.run", measured)
    result = invoke(main, "all", "--data", ".", *option)
    assert result.exit_code == 0, result.output
    *tables, last = result.stdout.splitlines()
    names = ("views", "step", "backends", "training")
    assert json.loads(last) == {name: {"ratio": 1.5} for name in names}
    assert tables == ([] if option else [f"table of {name}" for name in names])
