"""A profile as a table and as an HTML page."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

from rich.table import Table

from rsa_fast.insight import page as shared
from rsa_fast.insight.profiling import MODES, TOLERANCE
from rsa_fast.insight.timeline import PARTS
from rsa_fast.training.run_folder import this_process


def text_table(summary: dict[str, Any]) -> Table:
    """The result of `profile` as a table with a column for each method."""
    stages = ", ".join(f"{stage} {us:.0f}" for stage, us in summary["stages_us"].items())
    table = Table(
        "",
        *summary["methods"],
        title=f"{summary['dataset']}, milliseconds per iteration of {summary['batch_size']} images "
        f"on {summary['device']} in {summary['dtype']}",
        caption=f"views, microseconds per image on one thread: {stages}",
    )
    for row in rows_of(summary):
        table.add_row(*row)
    return table


def rows_of(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the table: a name, and a text for each method."""
    rows: list[tuple[str, ...]] = []

    def row(name: str, text: Callable[[dict[str, Any]], str]) -> None:
        rows.append((name, *map(text, summary["methods"].values())))

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
    row("stall share", lambda m: f"{max(0.0, m['stall_share']):.1%}")
    row("ratio to BYOL: step, views, both", over_byol)
    row("verdict", lambda m: m["verdict"])
    row("what to change", lambda m: m["knob"])
    return rows


def page(summary: dict[str, Any]) -> str:
    """The result of `profile` as an HTML page that needs no other file.

    Stacked bars show the parts of an iteration and the stages of the views. The table follows.
    """
    methods = summary["methods"]
    parts = {
        name: m["parts_ms"] | {"added by the views": max(0.0, m["both_ms"] - m["step_ms"])}
        for name, m in methods.items()
    }
    process = this_process()
    when = process["started"][:16].replace("T", " ")
    about = (
        f"{summary['dataset']} · batch {summary['batch_size']:,} on {summary['device']} in "
        f"{summary['dtype']} · turns: {summary['repeats']} · {when} on {process['host']}"
    )
    verdicts = "".join(
        f'<div class="{"fair" if loses(m) else "good"}">'
        f"<b>{escape(name)}: {m['verdict']}</b>, {m['images_per_s']:,.1f} images/s. "
        f'<span class="pale">What to change: {escape(m["knob"])}</span></div>'
        for name, m in methods.items()
    )
    title = f"Profile of {', '.join(methods)}"
    body = (
        f"<h1>{escape(title)}</h1>\n<p>{escape(about)}</p>\n"
        f"<code>{escape(shared.command_line(process['command']))}</code>\n<p></p>{verdicts}\n"
        "<h2>Where the time goes</h2>\n"
        + shared.bars("an iteration", parts, "ms")
        + shared.bars("the views of an image, on one thread", {"": summary["stages_us"]}, "µs")
        + "<h2>All numbers, in ms per iteration unless another unit is given</h2>\n"
        + shared.table(("", *methods), rows_of(summary))
    )
    return shared.html_page(title, body)


def loses(method: dict[str, Any]) -> bool:
    """Whether a method loses time because of the loader."""
    return bool(method["verdict"] != "compute-bound" or method["stall_share"] > TOLERANCE)
