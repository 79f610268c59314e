"""Train on two processes for a long time and print what grows.

    python -m tests.faults.soak --minutes 30 --backend native

This prints one JSON object. For each rank it contains the resident memory at the start and at the
end of the time after the warm-up, and the growth in percent. It also contains memory, open file
descriptors (one more while a checkpoint is written) and threads over time.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import click

from tests.faults.jobs import EPOCH_STEPS, Job, losses, newest, until
from tests.helpers import write_folder

WARM_UP = 0.25  # share of the time
# The medians of the first and the last window after the warm-up are compared.
WINDOW = 0.1  # share of the time
POINTS = 12


@click.command()
@click.option("--minutes", default=30.0, show_default=True)
@click.option("--backend", default="resident", show_default=True)
def soak(minutes: float, backend: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        data, out = (
            write_folder(Path(place, "data"), {"train": 20}, size=(64, 64)),
            Path(place, "run"),
        )
        with Job(data, out, "--epochs", 10**6, "--nproc", 2, "--backend", backend) as job:
            until(lambda: newest(out) > 0 or job.process.poll() is not None)
            ranks, began, rows = job.ranks(), time.monotonic(), []
            while time.monotonic() - began < 60 * minutes and job.process.poll() is None:
                rows.append((time.monotonic() - began, [measure(rank) for rank in ranks]))
                time.sleep(1)
            if job.process.poll() is not None:
                raise click.ClickException(f"the run ended by itself:\n{job.said}")
        steps = max(losses(out))
    found = {"backend": backend, "minutes": minutes, "steps": steps, "epochs": steps // EPOCH_STEPS}
    click.echo(
        json.dumps(found | {f"rank_{rank}": summary(rows, rank) for rank in range(len(ranks))})
    )


def measure(pid: int) -> dict[str, float]:
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    fds = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return {
        "resident_mib": int(status["VmRSS"].split()[0]) / 1024,
        "fds": fds,
        "threads": int(status["Threads"]),
    }


def summary(rows: list, rank: int) -> dict:
    rest = [measured[rank] for second, measured in rows if second >= WARM_UP * rows[-1][0]]
    window = max(1, int(WINDOW * len(rows)))
    first, last = (
        statistics.median(row["resident_mib"] for row in part)
        for part in (rest[:window], rest[-window:])
    )
    found = {
        "resident_mib": [round(first, 1), round(last, 1)],
        "growth_pct": round(100 * (last / first - 1), 2),
    }
    found |= {name: sorted({row[name] for row in rest}) for name in ("fds", "threads")}
    return found | {
        "over_time": [rows[i][1][rank] for i in range(0, len(rows), max(1, len(rows) // POINTS))]
    }


if __name__ == "__main__":
    soak()
