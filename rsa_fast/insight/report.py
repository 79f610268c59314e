"""A run as one web page, `report.html`: its scores, its curves and its settings.

    report([Path("runs/rsa"), Path("runs/byol")], Path("both.html"))

The page begins with each run's scores, next to those of chance and of the network before training.
Then there are verdicts on collapse and on the loader. The curves of several runs are drawn in the
same charts. The page of a single run also shows the views of some images and their nearest
neighbours (`examples`). Next are the classes that each run confuses, by its final predictions for
the test images.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rsa_fast.insight.examples import examples
from rsa_fast.insight.page import (
    COLOURS,
    Axis,
    Line,
    chart,
    command_line,
    darkness,
    html_page,
    table,
)
from rsa_fast.insight.runs import live_html
from rsa_fast.methods import short_name
from rsa_fast.pipelines.files import write_text
from rsa_fast.training.meter import COLLAPSE_STD, HEALTHY_STD
from rsa_fast.training.metrics import read_metrics
from rsa_fast.training.run_folder import read_starts

log = logging.getLogger("rsa_fast")

NAMED_CLASSES = 30  # with at most this number of classes, confusions have names and numbers
LISTED_CLASSES = 20  # rows of the table of the least accurate classes
UNLIKE = 3  # if the lengths differ by a larger factor, the axis is in percent of each run
SHORT_WAIT_PCT, LONG_WAIT_PCT = 5, 20  # good below the first, bad above the second
NEARLY_ONE_RANK = 1.5  # an effective rank of 1 means collapse

ABOUT_AXES = {
    "%": "The lengths of the runs differ, so the x axis is in percent of each run.",
    "step": "No epoch is complete, so the x axis is in steps.",
}
SCORES = {
    "knn_top1": "kNN top-1, k = 200",
    "knn20_top1": "kNN top-1, k = 20",
    "linear_top1": "linear top-1",
    "finetune_top1": "fine-tuned top-1",
}


@dataclass(frozen=True)
class Panel:
    """One chart, with a line for each key of the records in metrics.jsonl."""

    title: str
    keys: dict[str, str]  # the keys, with their names on the page
    from_zero: bool = False  # whether the y axis starts at 0


LOSS = Panel("loss", {key: key for key in ("loss", "weak", "aggressive")})
KNN = Panel("kNN top-1, %", {"knn_top1": "k = 200", "knn20_top1": "k = 20"}, True)
FINETUNE = Panel("fine-tuned top-1, %", {"finetune_top1": "top-1"}, True)
COSINES = Panel(
    "weak-aggressive cosine",
    {"weak_aggressive_cosine": "one image", "other_image_cosine": "two images"},
)
SMALL_PANELS = (
    Panel("embedding std (0: collapse)", {"embedding_std": ""}, True),
    Panel("effective rank (1: collapse)", {"effective_rank": ""}, True),
    COSINES,
    Panel("images/s", {"images_per_s": ""}, True),
    Panel("waiting for views, %", {"wait_pct": ""}, True),
    Panel("learning rate", {"lr": ""}),
    Panel("beta", {"beta": ""}),
    Panel("tau", {"tau": ""}),
)


@dataclass(frozen=True)
class RunFolder:
    """The contents of a run's folder. The content of a missing file is empty."""

    path: Path
    name: str
    records: list[dict[str, Any]]
    result: dict[str, Any]
    recipe: dict[str, Any]
    starts: list[dict[str, Any]]  # the content of env.json
    confusion: dict[str, Any]  # see `Evaluation.write_confusion`

    @property
    def steps_per_epoch(self) -> int | None:
        """It is None in the first epoch of a run of an earlier version, which did not record it."""
        if self.starts and "steps_per_epoch" in self.starts[-1]:
            return int(self.starts[-1]["steps_per_epoch"])
        ends = [record for record in self.records if record.get("epoch")]
        return ends[0]["step"] // ends[0]["epoch"] if ends else None

    @property
    def length(self) -> float:
        """The epochs of the whole run, or those up to now if there is no recipe."""
        epochs = self.records[-1]["step"] / (self.steps_per_epoch or 1)
        return float(max(self.recipe.get("epochs", 0) if self.steps_per_epoch else 0, epochs, 1e-9))

    @property
    def chance_pct(self) -> float | None:
        """The accuracy of guessing, if the number of classes is known."""
        recorded = self.starts[-1].get("classes", 0) if self.starts else 0
        classes = len(self.confusion.get("classes", ())) or recorded
        return 100 / classes if classes else None

    def last(self, key: str) -> Any:
        """The last value of a key in the records, or None."""
        values = series(self.records, key)[1]
        return values[-1] if values else None


def report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page of one or more runs and return its path.

    The path is `out`, or report.html in the folder of a single run.

    Raises FileNotFoundError if a folder contains no run. Raises ValueError for several runs without
    `out`, if `out` does not end in .html, and if nothing has been recorded.
    """
    if out is None and len(folders) > 1:
        raise ValueError(f"{len(folders)} runs on one page: give the page's name by --out")
    paths = [Path(folder) for folder in folders]
    out = Path(out or paths[0] / "report.html")
    if out.suffix != ".html":
        raise ValueError(
            f"the report is a web page: found --out {out}, but the name must end in .html"
        )
    all_runs = read_runs(paths)
    runs = [run for run in all_runs if run.records]
    begun = ", ".join(run.name for run in all_runs if not run.records)
    if not runs:
        raise ValueError(f"nothing is recorded yet in {begun}")
    if begun:
        log.info(f"left out: nothing is recorded yet in {begun}")
    title = ", ".join(run.name for run in runs)
    scores = [
        {key: value for key, value in run.result.items() if not key.endswith("_per_class")}
        or {"step": run.records[-1]["step"]}
        for run in runs
    ]
    heads = [headline(run, i if len(runs) > 1 else None) for i, run in enumerate(runs)]
    refresh, running = live_html(paths)
    body = [
        running,
        "".join(heads) if len(runs) == 1 else f"<h1>{escape(title)}</h1>{''.join(heads)}",
        curves(runs),
        examples(runs[0].path) if len(runs) == 1 else "",
        *(confusion_section(run) for run in runs if run.confusion),
        details("Scores", runs, scores),
        details("Recipe", runs, [run.recipe for run in runs]),
        details("Environment", runs, [(run.starts or [{}])[-1] for run in runs]),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, html_page(title, "\n".join(body), head=refresh))
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
            path=folder,
            name=name,
            records=read_metrics(folder),
            result=read(folder / "result.json", json.loads),
            recipe=shown(read(folder / "recipe.yaml", yaml.safe_load)),
            starts=read_starts(folder),
            confusion=read(folder / "confusion.json", json.loads),
        )
        for name, folder in zip(names, folders, strict=True)
    ]


def shown(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe for the page, with the short name of its method."""
    return recipe | {"method": short_name(recipe["method"])} if "method" in recipe else recipe


def series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[Any]]:
    """The steps and values of a key in order. If a step has two records, the later one counts."""
    points = {record["step"]: record[key] for record in records if record.get(key) is not None}
    return list(points), list(points.values())


# ---- The headline --------------------------------------------------------------------------------


def headline(run: RunFolder, colour: int | None) -> str:
    """The facts, scores and verdicts of a run. Each of several runs has its own colour."""
    name = f"{run.recipe['method']} on {data_name(run)}" if "method" in run.recipe else run.name
    level = "h1"
    if colour is not None:
        dot = f'<i class="dot" style="background: var(--c{colour % COLOURS})"></i>'
        level, name = "h2", f"{dot}{escape(run.name)}"
    else:
        name = escape(name)
    commands = [start["command"] for start in run.starts if "command" in start]
    parts = [
        f"<{level}>{name}</{level}>",
        f'<p class="long">{" · ".join(map(escape, facts(run)))}</p>',
        f"<code>{escape(command_line(commands[0]))}</code>" if commands else "",
        f'<div class="grid">{"".join(gauges(run, colour or 0))}</div>',
        "".join(
            f'<div class="{kind}"><b>{"✓" if kind == "good" else "!"}</b> {escape(text)}</div>'
            for kind, text in verdicts(run)
        ),
    ]
    return "\n".join(parts)


def data_name(run: RunFolder) -> str:
    return str(run.result.get("dataset") or run.recipe.get("name") or run.recipe.get("dataset", ""))


def facts(run: RunFolder) -> list[str]:
    """The data, the network, the progress and the time of a run, as texts."""
    recipe, start = run.recipe, (run.starts or [{}])[-1]
    texts = []
    if "images" in start:
        of = f" in {start['classes']:,} classes" if start["classes"] else ""
        texts.append(f"{start['images']:,} images{of}")
    if "arch" in recipe:
        size = recipe.get("views", {}).get("size_px")
        texts.append(f"{recipe['arch']}, {size} px, batch {recipe['batch_size']:,}")
    step, per_epoch = run.records[-1]["step"], run.steps_per_epoch
    total = per_epoch * recipe["epochs"] if per_epoch and "epochs" in recipe else None
    of = f" of {total:,}" if total else ""
    epochs = f" ({step // per_epoch:,} of {recipe['epochs']:,} epochs)" if total else ""
    state = "" if run.result and step == total else ", not finished" if total else ""
    texts.append(f"{step:,}{of} steps{epochs}{state}")
    if seconds := training_s(run.records):
        texts.append(f"trained for {duration(seconds)}")
    if "host" in start:
        gpus = start.get("gpus") or ["CPU"]
        device = f"{len(gpus)} x {gpus[0]}" if len(gpus) > 1 else gpus[0]
        when = run.starts[0]["started"][:16].replace("T", " ")
        texts.append(f"started {when} on {start['host']} ({device})")
    return texts


def training_s(records: list[dict[str, Any]]) -> float:
    """The seconds of all steps, without evaluations and checkpoints."""
    steps, step_ms = series(records, "step_ms")
    return float(np.dot(np.diff([0, *steps]), step_ms)) / 1e3


def duration(seconds: float) -> str:
    """A time as text, such as `12 s`, `3 min`, `2 h 05 min` or `3 d 4 h`."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def gauges(run: RunFolder, colour: int) -> Iterator[str]:
    """A box for each score, with the number and marks for chance and for the start."""
    chance = run.chance_pct
    for key, name in SCORES.items():
        steps, values = series(run.records, key)
        value = run.result.get(key, values[-1] if values else None)
        if value is None:
            continue
        beside = {"chance": chance} if chance else {}
        if steps and steps[0] == 0:
            beside["before training"] = values[0]
        marks = "".join(
            f'<i style="left:calc({level:.2f}% - 1px)" title="{name}"></i>'
            for name, level in beside.items()
        )
        texts = [f"{name} {level:.1f}" for name, level in beside.items()]
        best = max(zip(values, steps, strict=True), default=(value, 0))
        if best[0] > value and best[1] and run.steps_per_epoch:
            texts.append(f"best {best[0]:.1f} at epoch {best[1] / run.steps_per_epoch:g}")
        bar = f'<i style="width:{value:.2f}%; background:var(--c{colour % COLOURS})"></i>'
        yield (
            f'<div class="box"><b>{name}</b><div><span class="big">{value:.1f}</span> %</div>'
            f'<div class="gauge">{bar}{marks}</div>'
            f'<div class="pale">{" · ".join(texts)}</div></div>'
        )


def verdicts(run: RunFolder) -> Iterator[tuple[str, str]]:
    """The verdicts on the run: good, fair or bad, each with the reason."""
    steps, scores = series(run.records, "knn_top1")
    if len(steps) > 1 and steps[0] == 0:
        gain = scores[-1] - scores[0]
        text = f"kNN went from {scores[0]:.1f} before training to {scores[-1]:.1f} %"
        yield ("good", text) if gain > 0 else ("fair", f"{text}: no better than untrained")
    std, rank = run.last("embedding_std"), run.last("effective_rank")
    if std is not None:
        text = f"standard deviation of embeddings {std:.2f}"
        text += f", effective rank of features {rank:.1f}" if rank is not None else ""
        if std < COLLAPSE_STD or (rank or 2) < NEARLY_ONE_RANK:
            yield "bad", f"collapse: all images are embedded alike ({text})"
        elif std < HEALTHY_STD:
            yield "fair", f"close to collapse ({text})"
        else:
            yield "good", f"no collapse ({text})"
    waits = series(run.records, "wait_pct")[1]
    if waits:
        wait = run.result.get("wait_pct")
        wait = float(np.median(waits[1:] or waits)) if wait is None else wait
        text = f"the network waits for images {wait:.1f} % of the time"
        if wait <= SHORT_WAIT_PCT:
            yield "good", text
        else:
            kind = "fair" if wait <= LONG_WAIT_PCT else "bad"
            yield kind, f"{text}: rsa-fast profile finds the setting to change"


# ---- The curves ----------------------------------------------------------------------------------


def curves(runs: list[RunFolder]) -> str:
    """All charts for which at least one run has records.

    They have the same x axis, in epochs. It is in percent of each run if the lengths of the runs
    differ much. It is in steps if the steps per epoch of a run are unknown in its first epoch.
    """
    lengths = [run.length for run in runs]
    if any(run.steps_per_epoch is None for run in runs):
        axis, scales = Axis(max(lengths), "step"), [1.0] * len(runs)
    elif max(lengths) > UNLIKE * min(lengths):
        axis = Axis(100, "%")
        scales = [100 / (run.length * (run.steps_per_epoch or 1)) for run in runs]
    else:
        axis = Axis(max(lengths), "epoch")
        scales = [1 / (run.steps_per_epoch or 1) for run in runs]

    def lines_of(panel: Panel) -> list[Line]:
        lines = []
        for k, (key, name) in enumerate(panel.keys.items()):
            for i, (run, scale) in enumerate(zip(runs, scales, strict=True)):
                steps, values = series(run.records, key)
                x = [scale * step for step in steps]
                if values and len(runs) > 1:
                    full_name = f"{run.name}, {name}" if len(panel.keys) > 1 else run.name
                    lines.append(Line(full_name, x, values, colour=i, style=k))
                elif values:
                    lines.append(Line(name, x, values, colour=k))
        return lines

    wide, small = [], []
    for panel in (LOSS, KNN, FINETUNE):
        if not (lines := lines_of(panel)):
            continue
        levels, best = {}, None
        if panel is not LOSS:
            chances = {run.chance_pct for run in runs}
            if len(chances) == 1 and (chance := chances.pop()):
                levels["chance"] = chance
            if len(runs) == 1:
                first, top = lines[0], int(np.argmax(lines[0].y))
                best = (first.x[top], first.y[top])
                if first.x[0] == 0:
                    levels["before training"] = first.y[0]
        wide.append(
            chart(panel.title, lines, axis, from_zero=panel.from_zero, levels=levels, best=best)
        )
    for panel in SMALL_PANELS:
        if lines := lines_of(panel):
            small.append(chart(panel.title, lines, axis, from_zero=panel.from_zero))
        if panel is COSINES:
            for i, (run, scale) in enumerate(zip(runs, scales, strict=True)):
                title_end = f", {run.name}" if len(runs) > 1 else ""
                small += cosine_chart(run, scale, axis, title_end, colour=i)
    about = "" if axis.name == "epoch" else f"<p>{ABOUT_AXES[axis.name]}</p>\n"
    return (
        f'<h2>Curves</h2>\n{about}<div class="grid wide">{"".join(wide)}</div>\n'
        f'<div class="grid">{"".join(small)}</div>'
    )


def cosine_chart(
    run: RunFolder, scale: float, axis: Axis, title_end: str, colour: int
) -> Iterator[str]:
    """The distribution of the weak-aggressive cosines by epoch, and its mean."""
    steps, counts = series(run.records, "weak_aggressive_counts")
    if not counts:
        return
    share = np.array(counts).T / np.sum(counts, 1)  # (bins, epochs)
    epoch = steps[0] if len(steps) == 1 else steps[1] - steps[0]
    lowest = share.any(1).argmax() / len(share)  # no bin below it has an image
    share = share[int(lowest * len(share)) :]
    x, y = series(run.records, "weak_aggressive_cosine")
    yield chart(
        f"its distribution{title_end}",
        [Line("mean", [scale * step for step in x], y, colour)],
        axis,
        heat=(share[::-1], (scale * (steps[0] - epoch), scale * steps[-1], float(lowest), 1.0)),
    )


# ---- The classes ---------------------------------------------------------------------------------


def confusion_matrix(confusion: dict[str, Any]) -> np.ndarray:
    """The numbers of test images `(C, C)` by class and by predicted class."""
    counts = np.zeros([len(confusion["classes"])] * 2, np.int64)
    for label, predicted, count in confusion["counts"]:
        counts[label, predicted] = count
    return counts


def confusion_picture(counts: np.ndarray, classes: Sequence[str]) -> str:
    """A row for each class, with the share of its test images that is predicted as each class."""
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    if len(classes) > NAMED_CLASSES:
        return (
            f'<img class="small box" style="width:100%; padding:0" alt="confusion matrix" '
            f'src="{darkness(share)}"><p class="pale">The rows are the classes of the '
            "images, and the columns are the predicted classes.</p>"
        )
    rows = []
    for label, name in enumerate(classes):
        cells = "".join(
            f'<td style="background: rgb(80 136 224 / {share[label, predicted] ** 0.5:.2f})" '
            f'title="{escape(name)} predicted as {escape(classes[predicted])}">{count or ""}</td>'
            for predicted, count in enumerate(counts[label].tolist())
        )
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in classes)
    return (
        '<div class="scroll"><table class="cells"><thead><tr><th></th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="pale">The rows are the classes of the images, and the columns are the '
        "predicted classes.</p>"
    )


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
        rows.append((classes[label], accuracy, f"{totals[label]:,}", most))
    title = f"Classes by {run.confusion['score'].replace('_', '-')}, {run.name}"
    names = ("class", "top-1, %", "test images", "most often predicted as")
    return (
        f'<h2>{escape(title)}</h2>\n<div class="beside"><div>'
        f"{confusion_picture(counts, classes)}</div>\n{table(names, rows)}</div>\n"
    )


# ---- The tables ----------------------------------------------------------------------------------


def details(title: str, runs: list[RunFolder], fields: list[dict[str, Any]]) -> str:
    """A collapsed table with a row for each field and a column for each run.

    Rows in which the runs differ are marked, except for scores, which always differ.
    """
    columns = [dict(flatten(of_run)) for of_run in fields]
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [(key, *(column.get(key, "-") for column in columns)) for key in keys]
    differs = [i for i, row in enumerate(rows) if title != "Scores" and len(set(row[1:])) > 1]
    content = table(("", *(run.name for run in runs)), rows, differs)
    return f"<details><summary>{title}</summary>\n{content}</details>"


def flatten(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values as text. A field within a field has a name such as `views.size_px`."""
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):  # groups of crops
            for i, item in enumerate(value):
                given = {name: x for name, x in item.items() if x is not None}
                yield from flatten(given, f"{prefix}{key}.{i}.")
        else:
            values = value if isinstance(value, list) else ["-" if value is None else value]
            texts = [f"{v:.5g}" if isinstance(v, float) else str(v) for v in values]
            yield prefix + key, " ".join(texts) or "-"
