"""The benchmarks run and report what the README says they do; their figures are not tested."""

from __future__ import annotations

import json
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from tools.bench import main, median_ratio


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
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])
    assert keys <= figures.keys() and all(value > 0 for value in figures.values())


def test_ratios_pair_measurements_of_the_same_turn():
    assert median_ratio([2.0, 20.0, 4.0], [1.0, 10.0, 1.0]) == 2  # A slow turn slows both.


FILES = pytest.mark.skipif(
    not (find_spec("ffcv") and find_spec("nvidia.dali")), reason="needs FFCV and DALI: make setup"
)


@FILES
def test_backends_are_compared_on_files(folder):
    arguments = (
        "backends",
        "--data",
        str(folder),
        "--size",
        "16",
        "--batch-size",
        "8",
        "--turns",
        "1",
        "--seconds",
        "0.05",
    )
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])
    ratios = {"native_ratio", "native_of_decode_limit", "ffcv500_ratio", "ffcv_passthrough_ratio"}
    ratios |= {"native_over_torchvision_multi_crop", "multi_crop_pixel_cost"}
    if find_spec("lightly"):
        ratios |= {"native_over_lightly_multi_crop", "native_over_lightly_byol"}
    measured = {name.removesuffix("_images_per_s") for name in figures if "_per_s" in name}
    assert {"native_one_view", "ffcv500_one_view", "decode_simplejpeg"} < measured
    assert all(0 < figures[f"{name}_cpu_ms"] < 1000 for name in measured)
    assert ratios | {"dali_cpu_weak_ratio", "dali_cpu_ratio"} <= figures.keys()
    assert figures["native_ratio"] == pytest.approx(
        figures["native_images_per_s"] / figures["torchvision_images_per_s"], abs=1e-3
    )


@FILES
def test_rsa_and_byol_train_on_every_file_backend(folder):
    arguments = (
        "training",
        "--data",
        str(folder),
        "--arch",
        "resnet18",
        "--size",
        "16",
        "--batch-size",
        "8",
        "--turns",
        "1",
    )
    result = CliRunner().invoke(main, (*arguments, "--seconds", "0.05"))
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])
    for backend in ("native", "dali", "ffcv"):
        over = figures[f"{backend}_rsa_step_ms"] / figures[f"{backend}_byol_step_ms"]
        assert figures[f"{backend}_rsa_over_byol"] == pytest.approx(over, rel=1e-3)
        assert 0 <= figures[f"{backend}_rsa_wait_pct"] <= 100


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_all_of_them_end_in_one_json_object(monkeypatch, option):
    def measured(command: list[str], **_) -> SimpleNamespace:
        context = main.commands[command[3]].make_context(command[3], command[4:])
        return SimpleNamespace(stdout=f'table of {context.info_name}\n{{"ratio": 1.5}}\n')

    monkeypatch.setattr("subprocess.run", measured)
    result = CliRunner().invoke(main, ["all", "--data", ".", *option])
    assert result.exit_code == 0, result.output
    *tables, last = result.stdout.splitlines()
    names = ("views", "step", "backends", "training")
    assert json.loads(last) == {name: {"ratio": 1.5} for name in names}
    assert tables == ([] if option else [f"table of {name}" for name in names])
