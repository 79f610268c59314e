"""The benchmarks run and report what the README says they do; their figures are not tested."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from tools.bench import main, ratio


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (("views", "--batch-size", "8", "--turns", "1"), {"resident_host_ratio", "resident_device_ratio", "draw_ms"}),
        (
            ("step", "--width", "4", "--batch-size", "8", "--turns", "1"),
            {"loop_efficiency", "rsa_over_byol", "bf16_channels_last_speedup", "step_ms", "images_per_s"},
        ),
    ],
)
def test_the_last_line_is_one_json_object(arguments, keys):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])
    assert keys <= figures.keys() and all(value > 0 for value in figures.values())


def test_ratios_pair_measurements_of_the_same_turn():
    assert ratio([2.0, 20.0, 4.0], [1.0, 10.0, 1.0]) == 2  # a slow turn slows both
