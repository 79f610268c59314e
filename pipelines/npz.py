"""Arrays from an .npz file whoever wrote it: no pickle, no zip bomb, no more memory than the file is long."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def read_npz(path: Path, wanted: Mapping[str, np.dtype]) -> dict[str, np.ndarray]:
    """The arrays `wanted` (name: type) of what `np.savez` wrote. Raises FileNotFoundError, ValueError for anything else."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as stored:
            length = file.seek(0, io.SEEK_END)
            return {name: read_array(stored, length, name, dtype) for name, dtype in wanted.items()}
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged zip fails in many ways
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_array(stored: zipfile.ZipFile, length: int, name: str, wanted: np.dtype) -> np.ndarray:
    """One array of the zip file, which is `length` bytes long."""
    member = stored.getinfo(f"{name}.npy")
    if (
        member.compress_type != zipfile.ZIP_STORED
        or max(member.file_size, member.compress_size) > length
    ):
        raise ValueError(f"{member.filename} is compressed or larger than the file")
    data = bytearray(stored.read(member))
    header = io.BytesIO(data)
    if (version := np.lib.format.read_magic(header)) != (1, 0):
        raise ValueError(f"{member.filename} is of version {version}")
    shape, columns_first, dtype = np.lib.format.read_array_header_1_0(header)
    if dtype != wanted or columns_first:
        raise ValueError(f"{member.filename} holds {dtype}, wanted {wanted}")
    return np.frombuffer(data, dtype, offset=header.tell()).reshape(shape)
