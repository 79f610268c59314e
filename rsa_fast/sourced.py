"""Numbers with their sources: `cite("PAPER 4.1", epochs=200)`.

PAPER is RSA (NeurIPS 2022) with the section, CODE is github.com/tmllab/RSA, and `chosen` is where
neither says. `rsa-fast recipes DATASET/METHOD` prints the source of every number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sourced:
    value: Any
    source: str


Fields = dict[str, Sourced]  # by the names of the recipe's fields
Rows = dict[str, Fields]  # by the scale of the datasets for which they hold


def cite(source: str, **fields: Any) -> Fields:
    return {name: Sourced(value, source) for name, value in fields.items()}


def stacked(*rows: Rows) -> Rows:
    """Rows of several tables by scale, later ones on top."""
    return {
        scale: {name: cited for row in rows for name, cited in row.get(scale, {}).items()}
        for row in rows
        for scale in row
    }
