"""The report of `tools.gpu_report` as Markdown: the machine, then a table for each part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rsa_fast.tools.gpu_report.worker import Row

Columns = Mapping[str, str]  # the heading of a column, and the format string of its cells
MAX_ROWS = 40  # the most rows of a table


def as_markdown(report: dict[str, Any], columns: Mapping[str, Columns]) -> str:
    """The complete report. `columns` are the columns of each part's table."""
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
        f"- `plan`: {row['plan_row'] or 'has no figures for this card and predicts no times'}",
        f"- Versions: {versions}",
        f"- Host: {row['cores']} cores of {row['cpu']}, {row['memory_gib']:.0f} GiB",
    ]


def section(record: dict[str, Any], columns: Columns) -> list[str]:
    """A part's title, its table, and the cases without values, with the reasons."""
    rows: list[Row] = []  # those with values
    others: dict[str, list[str]] = {}  # the cases without values, by reason
    for row in record["rows"].values():
        if set(row) - {"case", "skipped", "fault", "note"}:
            rows.append(row)
        else:
            others.setdefault(remark(row), []).append(row["case"])
    remarks = [f"{'; '.join(cases)}: {text}" for text, cases in others.items()]
    if "skipped" in record:
        remarks.append(f"skipped: {record['skipped']}")
    if "fault" in record:  # a fault of the process, not of the case that was running
        remarks.append(fault_text(record["fault"]))
    if "under_way" in record:
        remarks.append(f"{record['under_way']}: was still running")
    if record.get("left_out"):
        remarks.append(
            f"{'; '.join(record['left_out'])}: left out, because the part's time was over"
        )
    lines = [f"**{record['title']}**"]
    if rows:
        lines += ["", *table_lines(thinned(rows), columns)]
    if remarks or not rows:
        lines += ["", *(f"- {text}" for text in remarks or ["nothing was measured"])]
    return lines


def table_lines(rows: list[Row], columns: Columns) -> list[str]:
    """The rows as a table. Columns without any value are left out."""
    used = {name: form for name, form in columns.items() if any(cell(form, row) for row in rows)}
    texts = [
        [row["case"], *(cell(form, row) for form in used.values()), remark(row)] for row in rows
    ]
    titles = ["", *used, "note"]
    width = len(titles) if any(text[-1] for text in texts) else len(titles) - 1
    return [f"| {' | '.join(cells[:width])} |" for cells in (titles, ["---"] * len(titles), *texts)]


def thinned(rows: list[Row]) -> list[Row]:
    """At most `MAX_ROWS` evenly spaced rows, with the first and the last one."""
    if len(rows) <= MAX_ROWS:
        return rows
    return [rows[i * (len(rows) - 1) // (MAX_ROWS - 1)] for i in range(MAX_ROWS)]


def cell(form: str, row: Row) -> str:
    """A row's cell, or an empty string if the row has no such value."""
    try:
        return form.format_map({key: value for key, value in row.items() if value is not None})
    except KeyError:
        return ""


def remark(row: Row) -> str:
    """A row's fault, the reason why it was skipped, or its note."""
    if "fault" in row:
        return fault_text(row["fault"])
    return one_line(f"skipped: {row['skipped']}" if "skipped" in row else row.get("note", ""))


def fault_text(fault: Row) -> str:
    return one_line(f"{fault['type']}: {fault['message']}")


def one_line(text: str) -> str:
    """The text as one line of at most 200 characters that fits into a cell of a table."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= 200 else f"{line[:199]}…"
