"""Numbers with their sources: `cite("PAPER 4.1", epochs=200)`.

PAPER is the RSA paper (NeurIPS 2022) with the section, and CODE is github.com/tmllab/RSA. "chosen"
marks our own choice, if neither of them has the number. `rsa-fast recipes DATASET/METHOD` prints
the source of every number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sourced:
    """The value of a recipe's field, and its source."""

    value: Any
    source: str


Fields = dict[str, Sourced]  # the keys are names of a recipe's fields
Rows = dict[str, Fields]  # the keys are scales of datasets, or "all"


def cite(source: str, **fields: Any) -> Fields:
    """Recipe fields that all come from one source."""
    return {name: Sourced(value, source) for name, value in fields.items()}


def updated(fields: Fields, changes: Fields) -> Fields:
    """`fields`, replaced by those of `changes`. Only the named numbers of the views change."""
    both = fields | changes
    if "views" in fields and "views" in changes:
        old, new = fields["views"], changes["views"]
        source = f"{old.source}; {', '.join(new.value)}: {new.source}"
        both["views"] = Sourced(old.value | new.value, source)
    return both


def merged_rows(*tables: Rows) -> Rows:
    """The rows of several tables, merged by scale. Later tables replace fields of earlier ones."""
    merged: Rows = {}
    for table in tables:
        for scale, fields in table.items():
            merged[scale] = updated(merged.get(scale, {}), fields)
    return merged
