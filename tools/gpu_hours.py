"""Print the table `GPU_HOURS` of rsa_fast/expected.py: the GPU-hours that `plan` predicts.

    python -m tools.gpu_hours

Decoding is left out, because it depends on the cores of the machine. The command takes ten minutes.
"""

from __future__ import annotations

import click

from rsa_fast.datasets import DATASETS
from rsa_fast.expected import GPU, GPUS, Expectation
from rsa_fast.insight.planning import plan
from rsa_fast.methods import METHODS
from rsa_fast.recipes import build_recipe, resolve


def gpu_hours(row: Expectation) -> float:
    """The GPU-hours of a row's run, rounded to two digits."""
    recipe = build_recipe(row.dataset, row.method, overrides=dict(row.changes))
    predicted = plan(recipe, GPU, row.gpus)
    step_ms = max(ms for limit, ms in predicted["limits_ms"].items() if limit != "decoding")
    steps = resolve(recipe, DATASETS[row.dataset].images).total_steps
    return float(f"{row.gpus * steps * step_ms / 3.6e6:.2g}")


@click.command()
def main() -> None:
    """Print the GPU-hours of every recipe of a published dataset, as Python."""
    for method in METHODS:
        rows = (Expectation(dataset, method, None, 0, gpus) for dataset, gpus in GPUS.items())
        click.echo(f'    "{method}": ({", ".join(f"{gpu_hours(row):g}" for row in rows)}),')


if __name__ == "__main__":
    main()
