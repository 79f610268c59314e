"""A run as one web page, `report.html`: its curves, scores, recipe and environment.

    report([Path("runs/rsa"), Path("runs/byol")], Path("both.html"))

The curves of several runs are drawn over each other. Below them is which classes each run confuses,
by the predictions for the test images at its end. The page consists of HTML with pictures as SVG
inside: no scripts, and nothing to load.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator, Sequence
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

from pipelines.files import write_text
from rsa_fast.methods import short_name
from rsa_fast.training.metrics import read_metrics
from rsa_fast.training.run_folder import read_starts

# Line styles and markers of a panel's keys, in their order.
STYLES = ("-", "--", ":")
MARKERS = "o^s"
COLUMNS = 3
PANEL_INCHES = (4.6, 3.0)
NAMED_CLASSES = 30  # up to so many classes have their names beside a confusion picture
COUNTED_CLASSES = 12  # and up to so many their numbers of images in it
LISTED_CLASSES = 20  # rows of the table of the least accurate classes

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px/1.45 system-ui, sans-serif; color: #222 }}
body {{ max-width: 1240px; margin: 2em auto; padding: 0 1em }}
h1, h2 {{ font-weight: 600 }} svg, img {{ width: 100%; height: auto }}
.beside {{ display: flex; flex-wrap: wrap; gap: 0 4em }} .beside > div {{ flex: 1 1 420px }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ text-align: left; vertical-align: top }}
th, td {{ padding: .15em 1.2em .15em 0; border-bottom: 1px solid #e4e4e4 }}
tbody th {{ font-weight: 400; color: #666 }} .differs td {{ background: #fff3c4 }}
td {{ overflow-wrap: anywhere }}
</style></head><body>
<h1>{title}</h1>
{curves}
<div class="beside">
<div>{scores}{environment}</div>
{recipe}
</div>
{confusions}
</body></html>
"""


@dataclass(frozen=True)
class Panel:
    """One plot, with a line for each key of the records in metrics.jsonl."""

    title: str
    x: str  # step or epoch
    keys: tuple[str, ...]
    from_zero: bool = False  # whether the y axis starts at 0


PANELS = (
    Panel("loss", "step", ("loss", "weak", "aggressive")),
    Panel("kNN top-1, %", "epoch", ("knn_top1", "knn20_top1"), True),
    Panel("fine-tuned top-1, %", "epoch", ("finetune_top1",), True),
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
    """The contents of a run's folder. Those of a missing file are empty."""

    name: str
    records: list[dict[str, Any]]
    result: dict[str, Any]
    recipe: dict[str, Any]
    environment: dict[str, Any]  # of the newest start
    confusion: dict[str, Any]  # see `Evaluation.write_confusion`


def report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page of one or more runs and return its path.

    The path is `out`, or report.html in the folder of a single run.

    Raises FileNotFoundError when a folder contains no run. Raises ValueError when several runs come
    without `out`, when `out` is no .html, and when nothing has been recorded.
    """
    if out is None and len(folders) > 1:
        raise ValueError(f"{len(folders)} runs on one page: --out says where it goes")
    paths = [Path(folder) for folder in folders]
    out = Path(out or paths[0] / "report.html")
    if out.suffix != ".html":
        raise ValueError(
            f"the report is a web page: found --out {out}, wanted a name that ends in .html"
        )
    runs = read_runs(paths)
    curves = svg(draw_figure(runs))  # first, as it refuses a run without records
    scores = [
        {key: value for key, value in run.result.items() if not key.endswith("_per_class")}
        or {"step": run.records[-1]["step"]}
        for run in runs
    ]
    page = PAGE.format(
        title=escape(", ".join(run.name for run in runs)),
        curves=curves,
        scores=html_table("Scores", runs, scores),
        recipe=html_table("Recipe", runs, [run.recipe for run in runs]),
        environment=html_table("Environment", runs, [run.environment for run in runs]),
        confusions="".join(confusion_section(run) for run in runs if run.confusion),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    return out


def read_runs(folders: list[Path]) -> list[RunFolder]:
    """The runs, named by their folders, or by their paths if two folders have the same name."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]

    def read(path: Path, load: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
        return load(path.read_text()) if path.is_file() else {}

    return [
        RunFolder(
            name=name,
            records=read_metrics(folder),
            result=read(folder / "result.json", json.loads),
            recipe=shown(read(folder / "recipe.yaml", yaml.safe_load)),
            environment=(read_starts(folder) or [{}])[-1],
            confusion=read(folder / "confusion.json", json.loads),
        )
        for name, folder in zip(names, folders, strict=True)
    ]


def shown(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as the page shows it: the short name of a method that is a file's path."""
    return recipe | {"method": short_name(recipe["method"])} if "method" in recipe else recipe


def series(records: list[dict[str, Any]], x: str, y: str) -> tuple[list[Any], list[Any]]:
    """The values of `x` and `y` in order; if two records have the same `x`, the later counts."""
    points = {
        record[x]: record[y] for record in records if x in record and record.get(y) is not None
    }
    return list(points), list(points.values())


def draw_figure(runs: list[RunFolder], panels: Sequence[Panel] = PANELS) -> Figure:
    """The panels for which any run has records, and histograms of cosines.

    A histogram, of weak-aggressive cosines by epoch, is drawn for each run that recorded them. Each
    of several runs has its own colour, named above the panels; a line's style then shows its key.
    """
    panels = [
        panel
        for panel in panels
        if any(series(run.records, panel.x, key)[0] for run in runs for key in panel.keys)
    ]
    with_cosines = [
        run for run in runs if series(run.records, "epoch", "weak_aggressive_counts")[0]
    ]
    count = len(panels) + len(with_cosines)
    if not count:
        raise ValueError(f"nothing is recorded yet in {', '.join(run.name for run in runs)}")
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    colours = []
    if len(runs) > 1:
        colours = [
            Line2D([], [], linewidth=3, color=f"C{i}", label=run.name) for i, run in enumerate(runs)
        ]
    legend = 0.25 * -(-len(colours) // columns)
    width = columns * PANEL_INCHES[0]
    height = rows * PANEL_INCHES[1] + legend
    figure = Figure((width, height))
    # Fixed margins in inches: to compute them would take as long as drawing.
    figure.subplots_adjust(
        left=0.5 / width,
        bottom=0.5 / height,
        right=1 - 0.1 / width,
        top=1 - (0.3 + legend) / height,
        wspace=0.17,
        hspace=0.35,
    )
    if colours:
        figure.legend(handles=colours, loc="upper left", ncols=columns, frameon=False)
    places = iter(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        draw_panel(next(places), panel, runs)
    for run in with_cosines:
        draw_cosines(next(places), run, "" if len(runs) == 1 else f", {run.name}")
    for empty in places:
        empty.remove()
    return figure


def draw_panel(axes: Axes, panel: Panel, runs: list[RunFolder]) -> None:
    several = len(runs) > 1
    # Later runs have thinner lines, so that both of two coinciding lines are seen.
    widths = np.linspace(1.2, 2.2, len(runs))[::-1]
    for k, key in enumerate(panel.keys):
        lines = [series(run.records, panel.x, key) for run in runs]
        marker = MARKERS[k] if max(len(x) for x, _ in lines) < 20 else "None"
        for i, (x, y) in enumerate(lines):
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
        if several and len(panel.keys) > 1 and any(x for x, _ in lines):
            axes.plot([], [], STYLES[k], color="gray", label=key, marker=marker, markersize=4)
    axes.set_xlim(left=0)
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    _, labels = axes.get_legend_handles_labels()
    decorate(axes, panel.title, panel.x, legend="best" if len(labels) > 1 else "")


def draw_cosines(axes: Axes, run: RunFolder, title_end: str) -> None:
    """A histogram of the weak-aggressive cosines by epoch, and their mean for different images."""
    epochs, counts = series(run.records, "epoch", "weak_aggressive_counts")
    share = np.array(counts).T / np.sum(counts, 1)  # (bins, epochs)
    epoch_edges = [*np.array(epochs) - 0.5, epochs[-1] + 0.5]
    cosine_edges = np.linspace(0, 1, len(share) + 1)
    norm = PowerNorm(0.5)  # shows bins of a few images too
    axes.pcolormesh(epoch_edges, cosine_edges, share, rasterized=True, cmap="Blues", norm=norm)
    axes.set_ylim(bottom=share.any(1).argmax() / len(share))
    x, y = series(run.records, "epoch", "other_image_cosine")
    axes.plot(x, y, "--C1", label="mean of two different images")
    title = f"cosine of weak and aggressive view{title_end}"
    decorate(axes, title, "epoch", legend="lower left")


def confusion_matrix(confusion: dict[str, Any]) -> np.ndarray:
    """The numbers of test images `(C, C)` by class and by predicted class."""
    counts = np.zeros([len(confusion["classes"])] * 2, np.int64)
    for label, predicted, count in confusion["counts"]:
        counts[label, predicted] = count
    return counts


def draw_confusion(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """A row for each class: the share of its test images that is taken for each class."""
    figure = Figure((7, 6), layout="constrained")
    axes = figure.subplots()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    norm = PowerNorm(0.5, vmin=0, vmax=1)  # shows shares of a few images too
    axes.imshow(share, cmap="Blues", norm=norm, interpolation="nearest")
    axes.set_xlabel("predicted", fontsize=8)
    axes.set_ylabel("class", fontsize=8)
    axes.tick_params(labelsize=8)
    if len(classes) <= NAMED_CLASSES:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= COUNTED_CLASSES:
        for (label, predicted), count in np.ndenumerate(counts):
            colour = "white" if share[label, predicted] > 0.4 else "#222"
            axes.text(
                predicted, label, f"{count:,}", ha="center", va="center", fontsize=8, color=colour
            )
    return figure


def confusion_section(run: RunFolder) -> str:
    """The picture of a run's confusions, and the table of its least accurate classes."""
    classes, counts = run.confusion["classes"], confusion_matrix(run.confusion)
    totals, right = counts.sum(1), counts.diagonal()
    scored = np.flatnonzero(totals)
    worst = scored[np.argsort(right[scored] / totals[scored], kind="stable")][:LISTED_CLASSES]
    wrong = counts - np.diag(right)
    rows = []
    for label in worst:
        taken_for = int(wrong[label].argmax())
        most = f"{classes[taken_for]} ({wrong[label, taken_for]:,})" if wrong[label].any() else "-"
        accuracy = f"{100 * right[label] / totals[label]:.1f}"
        cells = (classes[label], accuracy, f"{totals[label]:,}", most)
        rows.append("\n<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    title = f"Classes by {run.confusion['score'].replace('_', '-')}, {run.name}"
    names = ("class", "top-1, %", "test images", "most often taken for")
    head = "".join(f"<th>{name}</th>" for name in names)
    # An image of its own: the ids inside would be those of the curves.
    picture = base64.b64encode(svg(draw_confusion(counts, classes)).encode()).decode()
    return (
        f'<h2>{escape(title)}</h2>\n<div class="beside"><div>'
        f'<img alt="confusion matrix" src="data:image/svg+xml;base64,{picture}"></div>\n'
        f"<div><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        "</div>\n"
    )


def decorate(axes: Axes, title: str, x: str, legend: Literal["best", "lower left", ""]) -> None:
    """Add title, axes and grid, and a legend in the place `legend`, unless that is empty."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10), integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if legend:
        axes.legend(loc=legend, fontsize=7)


def svg(figure: Figure) -> str:
    """The figure as SVG. Text stays text, and the same run gives the same bytes."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rsa-fast"}):
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def html_table(title: str, runs: list[RunFolder], fields: list[dict[str, Any]]) -> str:
    """A row for each field and a column for each run; rows in which the runs differ are marked."""
    columns = [dict(flatten(of_run)) for of_run in fields]
    rows = []
    for key in dict.fromkeys(key for column in columns for key in column):
        values = [column.get(key, "-") for column in columns]
        differs = ' class="differs"' if len(set(values)) > 1 else ""
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        rows.append(f"\n<tr{differs}><th>{escape(key)}</th>{cells}</tr>")
    names = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    head = f"<thead><tr><th></th>{names}</tr></thead>"
    body = f"<tbody>{''.join(rows)}</tbody>"
    return f"<div><h2>{title}</h2>\n<table>{head}{body}</table></div>"


def flatten(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values as text; a field within a field is named as in `views.size_px`."""
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            values = value if isinstance(value, list) else ["-" if value is None else value]
            texts = [f"{v:.5g}" if isinstance(v, float) else str(v) for v in values]
            yield prefix + key, " ".join(texts) or "-"
