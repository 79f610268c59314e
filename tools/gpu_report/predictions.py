"""Predictions of `rsa_fast.insight.planning` for the measurements of `tools.gpu_report`."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from rsa_fast.tools.gpu_report.worker import Row, classify


class Predictions:
    """Predictions for the rows of a report, computed one by one on a thread."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.report = report
        self.thread = ThreadPoolExecutor(1)
        self.pending: list[tuple[str, str, Future[Row]]] = []  # part, case, prediction

    def __enter__(self) -> Predictions:
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)

    def request(self, part: str, row: Row) -> None:
        """Start the prediction of a row, if the row has the recipe that was measured."""
        if "recipe" in row:
            machine = self.report["parts"]["machine"]["rows"].get("machine", {})
            future = self.thread.submit(predict_or_note, part, dict(row), machine.get("plan_row"))
            self.pending.append((part, row["case"], future))

    def collect(self, until: float = 0.0) -> None:
        """Enter the finished predictions into the report. Wait for the others until `until`.

        `until` is a time of `time.monotonic()`.
        """
        futures = [future for *_, future in self.pending]
        done, waiting = wait(futures, max(0.0, until - time.monotonic()))
        for part, case, future in self.pending:
            if future in done:
                self.report["parts"][part]["rows"][case].update(future.result())
        self.pending = [entry for entry in self.pending if entry[2] in waiting]


def predict_or_note(part: str, row: Row, card: str | None) -> Row:
    """The predictions for a row, or a note with the reason why there are none."""
    try:
        return predict(part, row, card)
    except Exception as error:
        kind, value = classify(error)
        return {"note": f"not predicted: {value['message'] if kind == 'fault' else value}"}


def predict(part: str, row: Row, card: str | None) -> Row:
    """The predictions for a row, and their errors in percent of the measurements.

    `card` is the card's name in `planning.GPUS`. Without one only memory is predicted.
    """
    from rsa_fast.insight.planning import GIB, of_one_rank, plan, trace
    from rsa_fast.recipes import validate

    recipe = validate(row["recipe"])
    if part == "memory":
        ledger, _ = trace(of_one_rank(recipe, 1), recipe.batch_size, recipe.precision)
        return with_error(row, "allocated_gib", "predicted_gib", ledger.peak_bytes / GIB)
    if card is None or recipe.compile:  # the planner does not model compiled networks
        return {}
    if part == "step":
        forecast = plan(recipe, card)
        limits_ms = forecast["limits_ms"]
        gpu_ms = max(ms for limit, ms in limits_ms.items() if limit.startswith("GPU"))
        roofline_share = forecast["efficiency"] * gpu_ms / row["step_ms"]
        step_ms = max(ms for limit, ms in limits_ms.items() if limit != "decoding")
        prediction = with_error(row, "step_ms", "predicted_ms", step_ms)
        return {"roofline_share": roofline_share, **prediction}
    if part == "loop" and recipe.backend != "native":  # the planner models no other decoder
        return {}
    data = Path(row["data"]) if "data" in row else None
    rate = plan(recipe, card, cores=row["threads"], data=data)["images_per_s"]
    return with_error(row, "images_per_s", "predicted_per_s", rate)


def with_error(row: Row, measured: str, name: str, value: float) -> Row:
    """The prediction `value`, called `name`, and its error if the row has the `measured` value."""
    error = {"error_pct": 100 * (value / row[measured] - 1)} if row.get(measured) else {}
    return {name: value, **error}
