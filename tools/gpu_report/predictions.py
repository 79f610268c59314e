"""What `rsa_fast.insight.planning` predicts for what `tools.gpu_report` has measured."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from tools.gpu_report.worker import Row, outcome


class Predictions:
    """Predictions for the rows of a report, computed one by one on a thread."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.report = report
        self.thread = ThreadPoolExecutor(1)
        self.asked: list[tuple[str, str, Future[Row]]] = []

    def __enter__(self) -> Predictions:
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)

    def ask(self, part: str, row: Row) -> None:
        """Have a row predicted, if it says by which recipe it was measured."""
        if "recipe" in row:
            machine = self.report["parts"]["machine"]["rows"].get("machine", {})
            future = self.thread.submit(predicted_or_why, part, dict(row), machine.get("plan_row"))
            self.asked.append((part, row["case"], future))

    def collect(self, until: float = 0.0) -> None:
        """Enter the predictions that are there, and wait for the others until then."""
        futures = [future for *_, future in self.asked]
        done, waiting = wait(futures, max(0.0, until - time.monotonic()))
        for part, case, future in self.asked:
            if future in done:
                self.report["parts"][part]["rows"][case].update(future.result())
        self.asked = [asked for asked in self.asked if asked[2] in waiting]


def predicted_or_why(part: str, row: Row, card: str | None) -> Row:
    """The predictions of a row, or a note that says why there are none."""
    try:
        return predicted(part, row, card)
    except Exception as error:
        kind, value = outcome(error)
        return {"note": f"not predicted: {value['message'] if kind == 'fault' else value}"}


def predicted(part: str, row: Row, card: str | None) -> Row:
    """The predictions of a row, and by how many percent they are above what was measured.

    `card` is the card's name in `planning.GPUS`; without one only memory is predicted.
    """
    from rsa_fast.insight.planning import GIB, of_one_rank, plan, trace
    from rsa_fast.recipes import validate

    recipe = validate(row["recipe"])
    if part == "memory":
        ledger, _ = trace(of_one_rank(recipe, 1), recipe.batch_size, recipe.precision)
        return with_error(row, "allocated_gib", "predicted_gib", ledger.peak_bytes / GIB)
    if card is None or recipe.compile:  # what compiling saves is not modelled
        return {}
    if part == "step":
        found = plan(recipe, card)
        limits_ms = found["limits_ms"]
        roofline_ms = found["efficiency"] * max(
            ms for limit, ms in limits_ms.items() if limit.startswith("GPU")
        )
        step_ms = max(ms for limit, ms in limits_ms.items() if limit != "decoding")
        row_of_step = with_error(row, "step_ms", "predicted_ms", step_ms)
        return {"roofline_share": roofline_ms / row["step_ms"], **row_of_step}
    if part == "loop" and recipe.backend != "native":  # the planner knows no other decoder
        return {}
    data = Path(row["data"]) if "data" in row else None
    rate = plan(recipe, card, cores=row["threads"], data=data)["images_per_s"]
    return with_error(row, "images_per_s", "predicted_per_s", rate)


def with_error(row: Row, measured: str, name: str, value: float) -> Row:
    """The prediction `name` of what a row has under `measured`, or of what it could not measure."""
    error = {"error_pct": 100 * (value / row[measured] - 1)} if row.get(measured) else {}
    return {name: value, **error}
