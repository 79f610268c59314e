"""A run as one page, `report.html`: its curves, scores, recipe and environment. Several runs are laid over each other.

    report([Path("runs/rsa"), Path("runs/byol")], Path("both.html"))

The page is static and whole: one SVG inside, no scripts, nothing to load.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from rsa_fast.training.metrics import read_metrics

STYLES, MARKERS = ("-", "--", ":"), "o^s"  # of a panel's keys
COLUMNS, PANEL_INCHES = 3, (4.6, 3.0)

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px/1.45 system-ui, sans-serif; color: #222; max-width: 1240px; margin: 2em auto; padding: 0 1em }}
h1, h2 {{ font-weight: 600 }} svg {{ width: 100%; height: auto }}
.beside {{ display: flex; flex-wrap: wrap; gap: 0 4em }} .beside > div {{ flex: 1 1 420px }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ text-align: left; padding: .15em 1.2em .15em 0; border-bottom: 1px solid #e4e4e4; vertical-align: top }}
tbody th {{ font-weight: 400; color: #666 }} .differs td {{ background: #fff3c4 }} td {{ overflow-wrap: anywhere }}
</style></head><body>
<h1>{title}</h1>
{curves}
<div class="beside">
<div>{scores}{environment}</div>
{recipe}
</div>
</body></html>
"""


@dataclass(frozen=True)
class Panel:
    title: str
    x: str  # step or epoch
    keys: tuple[str, ...]  # of records, one line each
    from_zero: bool = False  # the y axis


PANELS = (
    Panel("loss", "step", ("loss", "weak", "aggressive")),
    Panel("kNN top-1, %", "epoch", ("knn_top1", "knn20_top1"), True),
    Panel(
        "cosine of weak and aggressive view, mean",
        "epoch",
        ("weak_aggressive_cosine", "other_image_cosine"),
    ),
    Panel("embedding_std (collapse: 0)", "step", ("embedding_std",), True),
    Panel("effective rank of features (collapse: 1)", "epoch", ("effective_rank",), True),
    Panel("throughput, images/s", "step", ("images_per_s",), True),
    Panel("waiting for views, % of the time", "step", ("wait_pct",), True),
    Panel("learning rate", "step", ("lr",)),
    Panel("beta", "step", ("beta",)),
    Panel("tau", "step", ("tau",)),
)
LOSS, KNN = PANELS[:2]


@dataclass(frozen=True)
class RunFolder:
    """What a run left behind; `result` is empty while it goes."""

    name: str
    records: list[dict[str, Any]]
    result: dict[str, Any]
    recipe: dict[str, Any]
    environment: dict[str, Any]


def report(folders: list[Path], out: Path | None = None) -> Path:
    """Write the page of one or more runs to `out`, or into the folder of the only one; returns its path.

    Raises FileNotFoundError when a folder holds no run, ValueError when several runs come without `out`, `out` is no .html,
    or nothing has been recorded.
    """
    if out is None and len(folders) > 1:
        raise ValueError(f"{len(folders)} runs on one page: --out says where it goes")
    out = out or folders[0] / "report.html"
    if out.suffix != ".html":
        raise ValueError(
            f"the report is a web page: found --out {out}, wanted a name that ends in .html"
        )
    runs = read_runs(folders)
    page = PAGE.format(
        title=escape(", ".join(run.name for run in runs)),
        curves=svg(draw(runs)),
        scores=table(
            "Scores", runs, [run.result or {"step": run.records[-1]["step"]} for run in runs]
        ),
        recipe=table("Recipe", runs, [run.recipe for run in runs]),
        environment=table("Environment", runs, [run.environment for run in runs]),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page)
    return out


def read_runs(folders: list[Path]) -> list[RunFolder]:
    """Named by their folders, or by their paths where those are alike."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = []
    for name, folder in zip(names, folders, strict=True):
        files = (
            ("result.json", json.loads),
            ("recipe.yaml", yaml.safe_load),
            ("env.json", json.loads),
        )
        facts = [
            load((folder / file).read_text()) if (folder / file).is_file() else {}
            for file, load in files
        ]
        runs.append(RunFolder(name, read_metrics(folder), *facts))
    return runs


def series(records: list[dict[str, Any]], x: str, y: str) -> tuple[list[Any], list[Any]]:
    """The values of `y` by `x`, in order; of two records at one `x` the later counts."""
    points = {
        record[x]: record[y] for record in records if x in record and record.get(y) is not None
    }
    return list(points), list(points.values())


def draw(runs: list[RunFolder], panels: Sequence[Panel] = PANELS) -> Figure:
    """The panels that any run has records for, and each run's histogram of weak-aggressive cosines by epoch.

    Several runs have a colour each, named above the panels, in which the style of a line tells its key.
    """
    panels = [
        panel
        for panel in panels
        if any(series(run.records, panel.x, key)[0] for run in runs for key in panel.keys)
    ]
    shifted = [run for run in runs if series(run.records, "epoch", "weak_aggressive_counts")[0]]
    count = len(panels) + len(shifted)
    if not count:
        raise ValueError(f"nothing is recorded yet in {', '.join(run.name for run in runs)}")
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    colours = [
        Line2D([], [], linewidth=3, color=f"C{i}", label=run.name) for i, run in enumerate(runs)
    ] * (len(runs) > 1)
    legend = 0.25 * -(-len(colours) // columns)
    width, height = columns * PANEL_INCHES[0], rows * PANEL_INCHES[1] + legend
    figure = Figure((width, height))  # margins in inches; finding them out takes as long as drawing
    figure.subplots_adjust(
        0.5 / width,
        0.5 / height,
        1 - 0.1 / width,
        1 - (0.3 + legend) / height,
        wspace=0.17,
        hspace=0.35,
    )
    if colours:
        figure.legend(handles=colours, loc="upper left", ncols=columns, frameon=False)
    places = iter(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        draw_panel(next(places), panel, runs)
    for run in shifted:
        draw_shift(next(places), run, "" if len(runs) == 1 else f", {run.name}")
    for empty in places:
        empty.remove()
    return figure


def draw_panel(axes: Axes, panel: Panel, runs: list[RunFolder]) -> None:
    several, widths = (
        len(runs) > 1,
        np.linspace(1.2, 2.2, len(runs))[::-1],
    )  # of lines that coincide both are seen
    for k, key in enumerate(panel.keys):
        points = [series(run.records, panel.x, key) for run in runs]
        marker = MARKERS[k] if max(len(x) for x, _ in points) < 20 else "None"
        for i, (x, y) in enumerate(points):
            if x:
                axes.plot(
                    x,
                    y,
                    STYLES[k],
                    color=f"C{i if several else k}",
                    linewidth=widths[i],
                    label="" if several else key,
                    marker=marker,
                    markersize=4,
                )
        if several and len(panel.keys) > 1 and any(x for x, _ in points):
            axes.plot([], [], STYLES[k], color="gray", label=key, marker=marker, markersize=4)
    axes.set_xlim(left=0)
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    decorate(
        axes,
        panel.title,
        panel.x,
        legend="best" if len(axes.get_legend_handles_labels()[1]) > 1 else "",
    )


def draw_shift(axes: Axes, run: RunFolder, of: str) -> None:
    epochs, counts = series(run.records, "epoch", "weak_aggressive_counts")
    share = np.array(counts).T / np.sum(counts, 1)  # (bins, epochs)
    edges = [*np.array(epochs) - 0.5, epochs[-1] + 0.5]
    norm = PowerNorm(0.5)  # on which a few images are seen too
    cosines = np.linspace(0, 1, len(share) + 1)
    axes.pcolormesh(edges, cosines, share, rasterized=True, cmap="Blues", norm=norm)
    axes.set_ylim(bottom=share.any(1).argmax() / len(share))
    axes.plot(
        *series(run.records, "epoch", "other_image_cosine"),
        "--C1",
        label="mean of two different images",
    )
    decorate(axes, f"cosine of weak and aggressive view{of}", "epoch", legend="lower left")


def decorate(axes: Axes, title: str, x: str, legend: Literal["best", "lower left", ""]) -> None:
    """`legend` is its place, or empty for none."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10), integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if legend:
        axes.legend(loc=legend, fontsize=7)


def svg(figure: Figure) -> str:
    """The figure as SVG: text stays text, and the same run gives the same bytes."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rsa-fast"}):
        figure.savefig(
            buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def table(title: str, runs: list[RunFolder], fields: list[dict[str, Any]]) -> str:
    """A row per field, a column per run; rows in which the runs differ are marked."""
    columns = [dict(flat(one)) for one in fields]
    rows = []
    for key in dict.fromkeys(key for column in columns for key in column):
        cells = [column.get(key, "-") for column in columns]
        differs = ' class="differs"' if len(set(cells)) > 1 else ""
        rows.append(
            f"\n<tr{differs}><th>{escape(key)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        )
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    return f"<div><h2>{title}</h2>\n<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def flat(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Fields within fields as `views.size_px`, values as they are shown."""
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            values = value if isinstance(value, list) else ["-" if value is None else value]
            yield (
                prefix + key,
                " ".join(f"{one:.5g}" if isinstance(one, float) else str(one) for one in values)
                or "-",
            )
