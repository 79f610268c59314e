"""Measure what only a GPU can show, and print the results as a Markdown table for docs/results.md.

    python -m tools.gpu_report --out gpu.json --minutes 9 --data data/cifar10

This needs one GPU and no network. A measurement whose library is missing is skipped, with the
reason. Each part has a share of the minutes. Time that a part does not use goes to later parts. The
JSON file is written after every measurement, so that nothing is lost when the command is stopped.
The predictions of `plan` are computed on the CPU at the same time, and shown beside the
measurements.

The exit code is 1 when a part has a fault. Accuracies and differences are reported but not judged.
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

from rsa_fast.tools.gpu_report.predictions import Predictions
from rsa_fast.tools.gpu_report.table import Columns, as_markdown
from rsa_fast.tools.gpu_report.worker import Message, Settings, Worker

# The seconds that a measurement may take after 1.5 shares of its part, or after all minutes.
GRACE_S = 15.0
START_S = 60.0  # the time that a new process may take to import its libraries
BATCH_COLUMNS = {"batch": "{batch_size}", "precision": "{precision}"}


@dataclass(frozen=True)
class Part:
    """Some measurements of one kind, and a table of them."""

    name: str
    share: float  # its share of the minutes, relative to the shares of the other parts
    place: str  # "module:function", where the function returns the part's cases
    title: str
    columns: Columns  # the columns of the table after the first one, which has the case


PARTS = (
    Part(
        name="machine",
        share=2,
        place="rsa_fast.tools.gpu_report.checks:machine",
        title="Machine",
        columns={},
    ),
    Part(
        name="values",
        share=12,
        place="rsa_fast.tools.gpu_report.checks:values",
        title="Views of a GPU against PIL's, in 8-bit levels",
        columns={
            "tests passed": "{passed} of {tests}",
            "images": "{images}",
            "weak, mean": "{weak_mean:.3f}",
            "weak, largest": "{weak_max:.0f}",
            "aggressive, mean": "{aggressive_mean:.3f}",
            "aggressive, largest": "{aggressive_max:.0f}",
        },
    ),
    Part(
        name="sync",
        share=10,
        place="rsa_fast.tools.gpu_report.checks:sync",
        title="Steps of the ImageNet-1K recipes in which the host never waits for the GPU",
        columns=BATCH_COLUMNS | {"steps": "{steps}"},
    ),
    Part(
        name="memory",
        share=18,
        place="rsa_fast.tools.gpu_report.steps:memory",
        title="Peak memory of a step on the ImageNet-1K recipes",
        columns={
            "allocated, GiB": "{allocated_gib:.2f}",
            "`plan`, GiB": "{predicted_gib:.2f}",
            "`plan`'s error": "{error_pct:+.1f}%",
            "reserved, GiB": "{reserved_gib:.2f}",
        },
    ),
    Part(
        name="step",
        share=22,
        place="rsa_fast.tools.gpu_report.steps:step",
        title="Training step on a ready batch, ImageNet-1K recipes",
        columns=BATCH_COLUMNS
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
        name="loop",
        share=16,
        place="rsa_fast.tools.gpu_report.loops:loop",
        title="Training from photographs, RSA on ImageNet-1K",
        columns=BATCH_COLUMNS
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
        name="resident",
        share=4,
        place="rsa_fast.tools.gpu_report.loops:resident",
        title="Training on images in the GPU's memory, RSA on CIFAR-10",
        columns=BATCH_COLUMNS
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
        name="resume",
        share=10,
        place="rsa_fast.tools.gpu_report.loops:resume",
        title="A run that was stopped and resumed, and the same run without a stop, RSA on "
        "ImageNet-1K",
        columns=BATCH_COLUMNS
        | {
            "steps": "{steps}",
            "resumed, largest difference of a weight": "{resumed_gap:.2g}",
            "repeated without a stop, largest difference": "{again_gap:.2g}",
        },
    ),
    Part(
        name="learn",
        share=10,
        place="rsa_fast.tools.gpu_report.loops:learn",
        title="RSA's accuracy against the minutes of training",
        columns={
            "minutes": "{minutes:.2f}",
            "kNN top-1": "{knn_top1:.1f}%",
            "linear top-1": "{linear_top1:.1f}%",
        },
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    names = [part.name for part in PARTS]
    chosen = options.parts.split(",") if options.parts else names
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"no part {', '.join(unknown)}: choose from {', '.join(names)}")
    try:
        from rsa_fast.pipelines.files import write_whole
        from rsa_fast.recipes import parse_set

        overrides = parse_set(tuple(options.set))
    except ImportError as error:
        parser.error(f"nothing can be measured here: {error}")
    except ValueError as error:
        parser.error(str(error))

    columns = {part.name: part.columns for part in PARTS}

    def save(report: dict[str, Any]) -> None:
        text = json.dumps(report, indent=1, allow_nan=False)
        markdown = as_markdown(report, columns)
        write_whole(options.out, lambda file: file.write(text.encode()))
        write_whole(options.out.with_suffix(".md"), lambda file: file.write(markdown.encode()))

    options.out.parent.mkdir(parents=True, exist_ok=True)
    parts = [part for part in PARTS if part.name in ("machine", *chosen)]
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


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_report",
        description="Measure what only a GPU can show. Write it as JSON and as a Markdown table.",
    )
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path("gpu.json"),
        help="the JSON file (%(default)s); the table is written beside it",
    )
    add("--minutes", type=float, default=9.0, help="time for all parts together (%(default)s)")
    add(
        "--data",
        type=Path,
        help="CIFAR-10 or similar images, or a folder of photographs; by default images are drawn",
    )
    add("--parts", help=f"some of {','.join(part.name for part in PARTS[1:])}")
    add(
        "--batch-sizes",
        type=integers,
        default=(64, 128, 256),
        help="batch sizes of the part memory (64,128,256)",
    )
    add("--images", type=int, default=512, help="number of photographs to draw (%(default)s)")
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
        help="a field of every recipe, such as arch=resnet18; repeatable",
    )
    return parser


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def repetitions(text: str) -> int:
    """Parse a number of repeats. Quartiles need at least 2. More than 150 may end the epoch."""
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
                    enter(record, message)
                    if message[0] == "begins":
                        print(f"{part.name}: {message[1]}", file=sys.stderr)
                    elif message[0] == "row":
                        predictions.request(part.name, message[1])
                    predictions.collect()
                    save(report)
                record |= {"state": state(record), "seconds": time.monotonic() - began}
                if "fault" not in record:
                    record.pop("under_way", None)
                # After a fault CUDA may be unusable, so the next part gets a new process.
                if record["state"] == "fault":
                    worker.close()
                    worker = None
        finally:
            if worker:
                worker.close()
        predictions.collect(ends_at + GRACE_S)
        save(report)
    return report


def share_of(shares: Sequence[float], left_s: float) -> float:
    """The seconds of the first of several parts when `left_s` seconds are left for all of them."""
    return max(0.0, left_s) * shares[0] / sum(shares)


def enter(record: dict[str, Any], message: Message) -> None:
    """Enter a worker's message into a part's record."""
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
    # By default the signal ends the process at once. An exception removes the scratch folder first.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
