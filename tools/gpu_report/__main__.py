"""Measure what only a GPU can show, and print it as a Markdown table for the README.

    python -m tools.gpu_report --out gpu.json --minutes 9 --data data/cifar10

It needs one GPU and no network. A measurement whose library is missing is skipped, with the reason.
Each part has its share of the minutes; time that a part does not use goes to the parts after it.
The JSON file is written after every measurement, so that nothing is lost when the command is
stopped. `plan`'s predictions are computed on the CPU meanwhile and stand beside what was measured.

The exit code is 1 when a part has a fault. Accuracies and differences are reported, not judged.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tools.gpu_report.predictions import Predictions
from tools.gpu_report.table import Columns, as_markdown
from tools.gpu_report.worker import Message, Settings, Worker

GRACE_S = 15.0  # what a measurement may take beyond 1.5 shares of its part, or beyond all minutes
START_S = 60.0  # what a new process may take to import its libraries
SHARED = {"batch": "{batch_size}", "precision": "{precision}"}


@dataclass(frozen=True)
class Part:
    """Some measurements of one kind, and a table of them."""

    name: str
    share: float  # of the minutes, relative to the shares of the other parts
    place: str  # module:function of its cases
    title: str
    columns: Columns  # of the table, after the case


PARTS = (
    Part("machine", 2, "tools.gpu_report.checks:machine", "Machine", {}),
    Part(
        "values",
        12,
        "tools.gpu_report.checks:values",
        "Views of a GPU against PIL's, in 8-bit levels",
        {
            "tests passed": "{passed} of {tests}",
            "images": "{images}",
            "weak, mean": "{weak_mean:.3f}",
            "weak, largest": "{weak_max:.0f}",
            "aggressive, mean": "{aggressive_mean:.3f}",
            "aggressive, largest": "{aggressive_max:.0f}",
        },
    ),
    Part(
        "sync",
        10,
        "tools.gpu_report.checks:sync",
        "Steps of the ImageNet-1K recipes in which the host never waits for the GPU",
        SHARED | {"steps": "{steps}"},
    ),
    Part(
        "memory",
        18,
        "tools.gpu_report.steps:memory",
        "Peak memory of a step on the ImageNet-1K recipes",
        {
            "allocated, GiB": "{allocated_gib:.2f}",
            "`plan`, GiB": "{predicted_gib:.2f}",
            "`plan`'s error": "{error_pct:+.1f}%",
            "reserved, GiB": "{reserved_gib:.2f}",
        },
    ),
    Part(
        "step",
        22,
        "tools.gpu_report.steps:step",
        "Training step on a ready batch, ImageNet-1K recipes",
        SHARED
        | {
            "step, ms": "{step_ms:.1f}",
            "quartiles, ms": "{low_ms:.1f} to {high_ms:.1f}",
            "images/s": "{images_per_s:,.0f}",
            "`plan`, ms": "{predicted_ms:.1f}",
            "`plan`'s error": "{error_pct:+.1f}%",
            "share of the roofline": "{roofline_share:.0%}",
            "over BYOL": "{over_byol:.3f}",
            "SM clock, MHz": "{sm_clock_mhz}",
        },
    ),
    Part(
        "loop",
        16,
        "tools.gpu_report.loops:loop",
        "Training from photographs, RSA on ImageNet-1K",
        SHARED
        | {
            "threads": "{threads}",
            "images/s": "{images_per_s:,.0f}",
            "waits for views": "{wait_pct:.1f}%",
            "views alone, images/s": "{views_per_s:,.0f}",
            "views, images/s per core": "{views_per_core_s:,.0f}",
            "`plan`, images/s": "{predicted_per_s:,.0f}",
            "`plan`'s error": "{error_pct:+.1f}%",
        },
    ),
    Part(
        "resident",
        4,
        "tools.gpu_report.loops:resident",
        "Training on images in the GPU's memory, RSA on CIFAR-10",
        SHARED
        | {
            "step, ms": "{step_ms:.2f}",
            "loop, ms": "{loop_ms:.2f}",
            "images/s": "{images_per_s:,.0f}",
            "loop efficiency": "{loop_efficiency:.3f}",
            "`plan`, images/s": "{predicted_per_s:,.0f}",
            "`plan`'s error": "{error_pct:+.1f}%",
        },
    ),
    Part(
        "resume",
        10,
        "tools.gpu_report.loops:resume",
        "A run that was stopped and resumed against one left alone, RSA on ImageNet-1K",
        SHARED
        | {
            "steps": "{steps}",
            "resumed, largest difference of a weight": "{resumed_gap:.2g}",
            "left alone again, largest difference": "{again_gap:.2g}",
        },
    ),
    Part(
        "learn",
        10,
        "tools.gpu_report.loops:learn",
        "RSA's accuracy against the minutes of training",
        {
            "minutes": "{minutes:.2f}",
            "kNN top-1": "{knn_top1:.1f}%",
            "linear top-1": "{linear_top1:.1f}%",
        },
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parser().parse_args(arguments)
    known = {part.name: part for part in PARTS}
    wanted = options.parts.split(",") if options.parts else list(known)
    if unknown := [name for name in wanted if name not in known]:
        parser().error(f"no part {', '.join(unknown)}: choose from {', '.join(known)}")
    try:
        from pipelines.files import write_whole
        from rsa_fast.recipes import parse_set

        overrides = parse_set(tuple(options.set))
    except ImportError as error:
        parser().error(f"nothing can be measured here: {error}")
    except ValueError as error:
        parser().error(str(error))

    columns = {part.name: part.columns for part in PARTS}

    def save(report: dict[str, Any]) -> None:
        text, table = json.dumps(report, indent=1, allow_nan=False), as_markdown(report, columns)
        write_whole(options.out, lambda file: file.write(text.encode()))
        write_whole(options.out.with_suffix(".md"), lambda file: file.write(table.encode()))

    options.out.parent.mkdir(parents=True, exist_ok=True)
    parts = [part for part in PARTS if part.name in ("machine", *wanted)]
    with TemporaryDirectory(prefix="gpu-report-") as scratch:
        settings = Settings(
            scratch=Path(scratch),
            data=options.data,
            batch_sizes=options.batch_sizes,
            images=options.images,
            repeats=options.repeats,
            overrides=overrides,
        )
        report = measure(parts, settings, 60 * options.minutes, save)
    print(as_markdown(report, columns))
    return int(any(record["state"] == "fault" for record in report["parts"].values()))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m tools.gpu_report",
        description="Measure what only a GPU can show; write it as JSON and as a Markdown table.",
    )
    add = found.add_argument
    add(
        "--out",
        type=Path,
        default=Path("gpu.json"),
        help="the JSON file (%(default)s); the table goes beside it",
    )
    add("--minutes", type=float, default=9.0, help="that all parts may take together (%(default)s)")
    add(
        "--data",
        type=Path,
        help="CIFAR-10 or the like, or a folder of photographs; without, images are drawn",
    )
    add("--parts", help=f"some of {','.join(part.name for part in PARTS[1:])}")
    add("--batch-sizes", type=whole_numbers, default=(64, 128, 256), help="for memory (64,128,256)")
    add("--images", type=int, default=512, help="photographs to draw (%(default)s)")
    add(
        "--repeats",
        type=repetitions,
        default=30,
        help="steps or batches in a measurement (%(default)s)",
    )
    add(
        "--set",
        action="append",
        default=[],
        help="a field of every recipe, as arch=resnet18; repeatable",
    )
    return found


def whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def repetitions(text: str) -> int:
    """At least 2 have quartiles; more than 150 would end an epoch within a measurement."""
    if not 2 <= (number := int(text)) <= 150:
        raise argparse.ArgumentTypeError(f"found {text}, wanted 2 to 150")
    return number


def measure(
    parts: Sequence[Part],
    settings: Settings,
    seconds: float,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Run the parts, one after another, and `save` the report after every measurement."""
    ends_at = time.monotonic() + seconds
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": sys.argv,
        "parts": {},
    }
    worker: Worker | None = None
    with Predictions(report) as predictions:
        try:
            for number, part in enumerate(parts):
                began = time.monotonic()
                share_s = share_of([p.share for p in parts[number:]], ends_at - began)
                record: dict[str, Any] = {"title": part.title, "state": "running", "rows": {}}
                report["parts"][part.name] = record
                killed_at = min(began + 1.5 * share_s, ends_at) + GRACE_S
                if worker is None:
                    worker, killed_at = Worker(settings), killed_at + START_S
                for message in worker.run(part.place, share_s, ends_at, killed_at):
                    note(record, message)
                    if message[0] == "begins":
                        print(f"{part.name}: {message[1]}", file=sys.stderr)
                    elif message[0] == "row":
                        predictions.ask(part.name, message[1])
                    predictions.collect()
                    save(report)
                record |= {"state": state(record), "seconds": time.monotonic() - began}
                if "fault" not in record:
                    record.pop("under_way", None)
                if record["state"] == "fault":  # CUDA may be unusable: the next part starts afresh
                    worker.close()
                    worker = None
        finally:
            if worker:
                worker.close()
        predictions.collect(ends_at + GRACE_S)
        save(report)
    return report


def share_of(shares: Sequence[float], left_s: float) -> float:
    """The seconds of the first of some parts when `left_s` seconds are left for all of them."""
    return max(0.0, left_s) * shares[0] / sum(shares)


def note(record: dict[str, Any], message: Message) -> None:
    """Enter what the worker reports into a part's record."""
    kind, value = message
    if kind == "row":
        record["rows"].setdefault(value["case"], {}).update(value)
    else:
        record["under_way" if kind == "begins" else kind] = value


def state(record: dict[str, Any]) -> str:
    """How a part ended: fault, skipped or ran."""
    rows = list(record["rows"].values())
    if any("fault" in entry for entry in (record, *rows)):
        return "fault"
    nothing_ran = bool(rows) and all("skipped" in row for row in rows)
    return "skipped" if "skipped" in record or nothing_ran else "ran"


if __name__ == "__main__":
    # An exception, unlike what the signal does by itself, has the scratch folder removed.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
