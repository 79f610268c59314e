"""The report of `tools.gpu_report` as Markdown: the machine, then a table of each part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tools.gpu_report.worker import Row

Columns = Mapping[str, str]  # the heading of a column, and the format string of a row's cell
MOST_ROWS = 40  # of a table


def as_markdown(report: dict[str, Any], columns: Mapping[str, Columns]) -> str:
    """The whole report; `columns` are those of each part's table."""
    parts = dict(report["parts"])
    machine = parts.pop("machine", {"rows": {}})
    lines = [*heading(report["date"], machine), ""]
    for name, record in parts.items():
        lines += [*section(record, columns[name]), ""]
    return "\n".join(lines)


def heading(date: str, machine: dict[str, Any]) -> list[str]:
    """The card and the date, and a list of versions and hardware."""
    row = machine["rows"].get("machine", {})
    if "name" not in row:
        reason = machine.get("skipped") or row.get("skipped") or "the machine was not described"
        return [f"### No GPU, {date}", "", f"{reason}."]
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    smi = ", ".join(f"{name} {value}" for name, value in row["smi"].items())
    return [
        f"### {row['name']}, {date}",
        "",
        f"- Card: {row['total_gib']:.2f} GiB, of which CUDA takes {row['context_gib']:.2f} itself, "
        f"compute capability {row['capability']}, {smi or 'no nvidia-smi'}",
        f"- `plan`: {row['plan_row'] or 'has no figures of this card and predicts no times'}",
        f"- Versions: {versions}",
        f"- Host: {row['cores']} cores of {row['cpu']}, {row['memory_gib']:.0f} GiB",
    ]


def section(record: dict[str, Any], columns: Columns) -> list[str]:
    """A part's title, its table, and what was left out and why."""
    measured: list[Row] = []
    others: dict[str, list[str]] = {}  # cases by the reason why they have no values
    for row in record["rows"].values():
        if set(row) - {"case", "skipped", "fault", "note"}:
            measured.append(row)
        else:
            others.setdefault(remark(row), []).append(row["case"])
    remarks = [f"{'; '.join(cases)}: {text}" for text, cases in others.items()]
    if "skipped" in record:
        remarks.append(f"skipped: {record['skipped']}")
    if "fault" in record:  # of the process, not of the case that was under way
        remarks.append(of_fault(record["fault"]))
    if "under_way" in record:
        remarks.append(f"{record['under_way']}: was under way")
    if record.get("left_out"):
        remarks.append(f"{'; '.join(record['left_out'])}: left out, the part's time was over")
    lines = [f"**{record['title']}**"]
    if measured:
        lines += ["", *table(thinned(measured), columns)]
    if remarks or not measured:
        lines += ["", *(f"- {text}" for text in remarks or ["nothing was measured"])]
    return lines


def table(rows: list[Row], columns: Columns) -> list[str]:
    """The rows under the columns that any of them has a value for; a last one is for notes."""
    used = {name: form for name, form in columns.items() if any(cell(form, row) for row in rows)}
    texts = [
        [row["case"], *(cell(form, row) for form in used.values()), remark(row)] for row in rows
    ]
    titles = ["", *used, "note"]
    width = len(titles) if any(text[-1] for text in texts) else len(titles) - 1
    return [line(cells[:width]) for cells in (titles, ["---"] * len(titles), *texts)]


def thinned(rows: list[Row]) -> list[Row]:
    """At most `MOST_ROWS` rows, evenly spaced; the first and the last stay."""
    if len(rows) <= MOST_ROWS:
        return rows
    return [rows[i * (len(rows) - 1) // (MOST_ROWS - 1)] for i in range(MOST_ROWS)]


def cell(form: str, row: Row) -> str:
    """A row's cell, empty where the row has no such value."""
    try:
        return form.format_map({key: value for key, value in row.items() if value is not None})
    except KeyError:
        return ""


def remark(row: Row) -> str:
    """What a row says besides numbers."""
    if "fault" in row:
        return of_fault(row["fault"])
    return one_line(f"skipped: {row['skipped']}" if "skipped" in row else row.get("note", ""))


def of_fault(fault: Row) -> str:
    return one_line(f"{fault['type']}: {fault['message']}")


def one_line(text: str) -> str:
    """Text that stays in its cell of a table."""
    first = " ".join(text.split()).replace("|", "\\|")
    return first if len(first) <= 200 else f"{first[:199]}…"


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
