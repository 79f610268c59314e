"""The text for a person at a terminal: a few lines for a command's result, instead of JSON.

This module imports nothing heavy, so the first line of a command appears immediately.
"""

from __future__ import annotations

import os
import shlex
import shutil
import textwrap
from pathlib import Path
from typing import Any

# The titles of the scores in a result. All scores are in percent.
SCORES = {
    "knn": "kNN",
    "linear": "linear",
    "linear_best": "linear at its best epoch",
    "finetune": "fine-tuned",
    "finetune_best": "at its best epoch",
    "box": "box",
    "mask": "mask",
}
# The titles of the scores in the records of a run.
RECORDED_SCORES = {"knn_top1": "kNN", "linear_top1": "linear", "finetune_top1": "fine-tuned"}
KINDS = {"top1": "", "top5": " top-5", "ap": " AP", "ap50": " AP50", "ap75": " AP75"}
# The titles of the numbers in the results of commands without scores.
NUMBERS = {
    "rows": "rows",
    "dim": "features in each",
    "images": "images",
    "left_out": "left out",
    "classes": "classes",
    "parameters": "parameters",
    "same_class_pct": "% of the neighbours have the same class",
    "chance_pct": "% by chance",
    "images_per_s": "images/s",
}
# The command that usually follows. Only the words in capitals have to be replaced.
NEXT = {
    "train": "rsa-fast embed --checkpoint {out} --out embeddings.csv",
    "finetune": "rsa-fast predict --checkpoint {out} --data FOLDER --out predictions.csv",
    "eval": "rsa-fast neighbours --checkpoint {checkpoint}{data} --out neighbours.html",
    "embed": "rsa-fast neighbours --embeddings {out} --out neighbours.html",
    "profile": "rsa-fast train --config {out}",
}


def result_lines(command: str, result: dict[str, Any]) -> str:
    """The result of a command in up to three lines: scores, files and the next command."""
    rows = {"done": done(command, result)}
    if out := result.get("out"):
        rows["files"] = str(out)
        if names := [name for name in RESULT_FILES if (Path(out) / name).exists()]:
            rows["files"] += f": {', '.join(names)}"
    if form := NEXT.get(command):
        data = result.get("data")
        places = {
            "out": shlex.quote(str(result.get("out"))),
            "checkpoint": shlex.quote(str(result.get("checkpoint"))),
            "data": f" --data {shlex.quote(data)}" if isinstance(data, str) else "",
        }
        rows["next"] = form.format_map(places)
    return "\n".join(f"{title:6} {text}" for title, text in rows.items() if text)


RESULT_FILES = ("report.html", "result.json", "checkpoints")  # in a run's folder


def done(command: str, result: dict[str, Any]) -> str:
    """The scores of a result, the first one with values to compare with, or else its numbers."""
    scores: list[str] = []
    for key, value in result.items():
        name, _, kind = key.rpartition("_")
        if name in SCORES and kind in KINDS and isinstance(value, int | float):
            compared = "" if scores else remark(name, result)
            scores.append(f"{SCORES[name]}{KINDS[kind]} {value:.1f}{compared}")
    if scores:
        return "   ".join(scores)
    counts = [
        f"{digits(result[key])} {name}"
        for key, name in NUMBERS.items()
        if isinstance(result.get(key), int | float)
    ]
    steps = f"{result['step']:,} steps, no scores" if "step" in result else ""
    return ", ".join([*([steps] if steps else []), *counts])


def remark(name: str, result: dict[str, Any]) -> str:
    """The accuracy by chance and, for kNN, the first and the best score during the run."""
    classes = result.get(f"{name}_per_class")
    parts = [f"chance {100 / len(classes):.1f}"] if classes else []
    metrics = Path(str(result.get("out"))) / "metrics.jsonl"
    if name == "knn" and metrics.is_file():
        from rsa_fast.training.run_folder import read_metrics

        records = [r for r in read_metrics(metrics.parent) if r.get("knn_top1") is not None]
        parts += [f"at the start {r['knn_top1']:.1f}" for r in records[:1] if r["step"] == 0]
        if trained := [record for record in records if record["step"] > 0]:
            best = max(trained, key=lambda record: record["knn_top1"])
            if best["knn_top1"] > trained[-1]["knn_top1"]:
                parts.append(f"best {best['knn_top1']:.1f} at epoch {best.get('epoch')}")
    return f" ({', '.join(parts)})" if parts else ""


def digits(value: float) -> str:
    """A number with its significant digits: all digits of a count, or else about three."""
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """A duration such as `0:14` or `2:03:00`."""
    if seconds is None:
        return "-:--"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def age(seconds: float) -> str:
    """A time span in its largest unit: `5 s`, `12 min`, `3 h`, `2 days`."""
    for unit, size_s, most in (("s", 1, 60), ("min", 60, 60), ("h", 3600, 48)):
        if seconds < most * size_s:
            return f"{seconds / size_s:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def wrapped(line: str) -> str:
    """An indented line of a list, wrapped between words at the terminal's width.

    Other lines are not wrapped, so that a command in them can be copied.
    """
    width = shutil.get_terminal_size().columns
    if not line.startswith(" ") or len(line) <= width:
        return line
    indent = len("  ") + len(line.split()[0].ljust(9)) + 1  # the column of the line's text
    return textwrap.fill(
        line,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def speaks() -> bool:
    """Whether this process writes the lines that are the same in all processes of a job."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
