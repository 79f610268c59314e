"""Read arrays from untrusted .npz files: no pickle, no decompression bomb.

Reading never takes more memory than the size of the file.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def read_npz(
    path: Path, wanted: Mapping[str, np.dtype], optional: Mapping[str, np.dtype] | None = None
) -> dict[str, np.ndarray]:
    """The arrays `wanted` (name: type) from a file written by `np.savez`.

    The arrays `optional` are read if the file has them.

    Raises FileNotFoundError, and ValueError for a file that is damaged or contains other arrays.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            length = file.seek(0, io.SEEK_END)
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            types = {name: kind for name, kind in (optional or {}).items() if name in names}
            types |= wanted
            return {name: read_array(archive, length, name, types[name]) for name in types}
    except FileNotFoundError:
        raise
    except Exception as error:  # A damaged zip file raises exceptions of many types.
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_array(archive: zipfile.ZipFile, length: int, name: str, wanted: np.dtype) -> np.ndarray:
    """One array, of type `wanted`, from a zip file that is `length` bytes long."""
    member = archive.getinfo(f"{name}.npy")
    size = max(member.file_size, member.compress_size)
    if member.compress_type != zipfile.ZIP_STORED or size > length:
        raise ValueError(f"{member.filename} is compressed or larger than the file")
    data = bytearray(archive.read(member))
    header = io.BytesIO(data)
    if (version := np.lib.format.read_magic(header)) != (1, 0):
        raise ValueError(f"{member.filename} has version {version}, wanted (1, 0)")
    shape, columns_first, dtype = np.lib.format.read_array_header_1_0(header)
    if dtype != wanted or columns_first:
        raise ValueError(f"{member.filename} contains {dtype}, wanted {wanted}")
    return np.frombuffer(data, dtype, offset=header.tell()).reshape(shape)
