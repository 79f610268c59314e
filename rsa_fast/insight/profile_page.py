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


def table(report: dict[str, Any]) -> Table:
    """A column for each method."""
    methods = report["methods"].values()
    title = f"milliseconds per iteration of {report['batch_size']} images on {report['device']} in {report['dtype']}"
    stages = ", ".join(f"{stage} {us:.0f}" for stage, us in report["stages_us"].items())
    grid = Table(
        "",
        *report["methods"],
        title=title,
        caption=f"views, microseconds per image on one thread: {stages}",
    )

    def row(name: str, text: Callable[[dict[str, Any]], str]) -> None:
        grid.add_row(name, *(text(method) for method in methods))

    def times(mode: str) -> Callable[[dict[str, Any]], str]:
        return lambda m: "{:.2f} ({:.2f} to {:.2f})".format(m[f"{mode}_ms"], *m["range_ms"][mode])

    def part_ms(part: str) -> Callable[[dict[str, Any]], str]:
        return lambda m: f"{m['parts_ms'][part]:.2f}"

    row(MODES["step"], times("step"))
    for part in PARTS:
        row(f"  {part.replace('_', ' ')}", part_ms(part))
    row(MODES["views"], times("views"))
    row(MODES["cold_views"], lambda m: m["cold_fault"] or times("cold_views")(m))
    row(MODES["both"], times("both"))
    row("images/s", lambda m: f"{m['images_per_s']:,.1f}")
    row("peak GiB", lambda m: f"{m['peak_gib']:.2f}")
    row("stall share", lambda m: f"{m['stall_share']:.1%}")
    row(
        "of BYOL: step, views, both",
        lambda m: ", ".join(f"{x:.3f}" for x in (m["over_byol"] or {}).values()),
    )
    row("verdict", lambda m: m["verdict"])
    row("what to turn", lambda m: m["knob"])
    return grid


def page(report: dict[str, Any]) -> str:
    """An HTML page that needs no other file: an iteration's parts and the views' stages as stacked bars, and the table."""
    methods = report["methods"]
    figure = Figure(figsize=(12, len(methods) + 4), layout="constrained")
    parts = {
        name: m["parts_ms"] | {"added by the views": m["both_ms"] - m["step_ms"]}
        for name, m in methods.items()
    }
    charts = {"ms per iteration": parts, "us per image, one thread": {"views": report["stages_us"]}}
    for axes, (unit, bars) in zip(
        figure.subplots(2, 1, height_ratios=[len(methods), 1]), charts.items(), strict=True
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
    console.print(table(report))
    text = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
    return f'<!doctype html>\n<meta charset="utf-8">\n<title>rsa-fast profile</title>\n{svg(figure)}{text}\n'
