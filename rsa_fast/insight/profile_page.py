"""A profile as a table and as an HTML page."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from rsa_fast.insight.profiling import MODES
from rsa_fast.insight.report import svg
from rsa_fast.insight.timeline import PARTS


def text_table(summary: dict[str, Any]) -> Table:
    """What `profile` returned as a table with a column for each method."""
    methods = summary["methods"].values()
    stages = ", ".join(f"{stage} {us:.0f}" for stage, us in summary["stages_us"].items())
    table = Table(
        "",
        *summary["methods"],
        title=f"{summary['dataset']}, milliseconds per iteration of {summary['batch_size']} images "
        f"on {summary['device']} in {summary['dtype']}",
        caption=f"views, microseconds per image on one thread: {stages}",
    )

    def row(name: str, text: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(name, *(text(method) for method in methods))

    def times(mode: str) -> Callable[[dict[str, Any]], str]:
        return lambda m: "{:.2f} ({:.2f} to {:.2f})".format(m[f"{mode}_ms"], *m["range_ms"][mode])

    def part_ms(part: str) -> Callable[[dict[str, Any]], str]:
        return lambda m: f"{m['parts_ms'][part]:.2f}"

    def over_byol(method: dict[str, Any]) -> str:
        return ", ".join(f"{ratio:.3f}" for ratio in (method["over_byol"] or {}).values())

    row(MODES["step"], times("step"))
    for part in PARTS:
        row(f"  {part.replace('_', ' ')}", part_ms(part))
    row(MODES["views"], times("views"))
    row(MODES["cold_views"], lambda m: m["cold_fault"] or times("cold_views")(m))
    row(MODES["both"], times("both"))
    row("images/s", lambda m: f"{m['images_per_s']:,.1f}")
    row("peak GiB", lambda m: f"{m['peak_gib']:.2f}")
    row("stall share", lambda m: f"{m['stall_share']:.1%}")
    row("of BYOL: step, views, both", over_byol)
    row("verdict", lambda m: m["verdict"])
    row("what to change", lambda m: m["knob"])
    return table


def page(summary: dict[str, Any]) -> str:
    """What `profile` returned as an HTML page that needs no other file.

    Stacked bars show the parts of an iteration and the stages of the views; the table follows.
    """
    methods = summary["methods"]
    parts = {
        name: m["parts_ms"] | {"added by the views": m["both_ms"] - m["step_ms"]}
        for name, m in methods.items()
    }
    stages = {"views": summary["stages_us"]}
    figure = Figure(figsize=(12, len(methods) + 4), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[len(methods), 1])
    for axes, unit, bars in (
        (upper, "ms per iteration", parts),
        (lower, "us per image, one thread", stages),
    ):
        left = np.zeros(len(bars))
        for part in next(iter(bars.values())):
            width = np.array([max(0.0, bar[part]) for bar in bars.values()])
            axes.barh(list(bars), width, left=left, label=part.replace("_", " "))
            left += width
        axes.set_xlabel(unit)
        axes.invert_yaxis()
        axes.legend(ncols=8, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1))
    console = Console(record=True, file=io.StringIO(), width=140)
    console.print(text_table(summary))
    table = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
    title = "<title>rsa-fast profile</title>"
    return f'<!doctype html>\n<meta charset="utf-8">\n{title}\n{svg(figure)}{table}\n'
