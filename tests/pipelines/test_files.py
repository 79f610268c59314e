from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from rsa_fast.pipelines.files import json_text, write_whole


def test_the_name_appears_after_the_bytes_are_on_the_disk_and_then_the_folder_is_synced(
    tmp_path, monkeypatch
):
    path, calls = tmp_path / "a.bin", []

    def sync(handle: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{handle}"))
        calls.append(
            (
                "sync folder" if place.is_dir() else "sync",
                path.exists(),
                place.stat().st_size if place.is_file() else None,
            )
        )

    monkeypatch.setattr(os, "fsync", sync)
    write_whole(path, lambda file: file.write(b"12345"))
    assert calls == [("sync", False, 5), ("sync folder", True, None)]
    assert path.read_bytes() == b"12345" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk"), ValueError("content"), KeyboardInterrupt()])
def test_a_write_that_fails_midway_leaves_what_was_there_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")

    def half(file) -> None:
        file.write(b"12345")
        file.flush()
        assert len(list(tmp_path.iterdir())) == 2
        raise error

    with pytest.raises(type(error)):
        write_whole(path, half)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_json_has_null_for_numbers_that_are_not_finite():
    numbers = {"a": math.nan, "b": [math.inf, (-math.inf, 1.5)], "c": {"d": np.float64("nan")}}
    expected = {"a": None, "b": [None, [None, 1.5]], "c": {"d": None}}
    for indent in (None, 1):
        text = json_text(numbers, indent)
        assert json.loads(text, parse_constant=pytest.fail) == expected
    assert json_text({"e": 1, "f": "NaN", "g": True}) == json.dumps({"e": 1, "f": "NaN", "g": True})
