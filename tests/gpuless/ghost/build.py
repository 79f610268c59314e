"""Build the fake CUDA runtime for the installed torch, once: later calls find it in a cache.

runtime.cpp holds the functions that do something. For every other function of CUDA that torch's
libraries import, one is generated that returns 0. A program on the fake runtime therefore never
reaches NVIDIA's own libraries through torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("runtime.cpp")

# The fake runtime has the name of the driver's library, which torch needs and which no Python
# package provides.
LIBRARY = "libcuda.so.1"

# The functions of the CUDA runtime, cuBLAS, cuDNN, NCCL and the driver (cuInit). Those of cuFile
# (cuFileRead) look like the driver's, but their library comes with torch and loads without a GPU.
IMPORT = re.compile(r" U ((?:__)?cuda[A-Z]\w+|(?:cublas|cudnn|nccl)[A-Z]\w+|cu(?!File)[A-Z]\w+)")
DEFINITION = re.compile(r" T (\w+)")

COMPILER = ("g++", "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra")


def build() -> Path:
    """Return the path of the fake runtime's library. Several processes may call this at once.

    Raises `subprocess.CalledProcessError` if the compiler fails, after it has printed why.
    """
    sources = SOURCE.read_bytes() + Path(__file__).read_bytes()
    version = f"{torch.__version__}-{hashlib.sha256(sources).hexdigest()[:12]}"
    folder = cache_folder() / f"ghost-{version}"
    with folder.with_name("ghost.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
        if not folder.is_dir():
            # The folder is renamed when it is complete, so an interrupted build leaves none.
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                compile_in(Path(scratch))
                Path(scratch).rename(folder)
                Path(scratch).mkdir()  # TemporaryDirectory removes this one.
    return folder / LIBRARY


def cache_folder() -> Path:
    """Return the user's cache folder of this project, or a temporary one if it is not writable.

    Other users may write into the folder of temporary files. A library that they put there must
    not be loaded, so the folder has to belong to this user.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    candidates = (caches / "rsa-fast", Path(tempfile.gettempdir(), f"rsa-fast-{os.getuid()}"))
    for folder in candidates:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    tried = " or ".join(str(folder) for folder in candidates)
    raise PermissionError(f"cannot write to {tried}: set XDG_CACHE_HOME to a folder of yours")


def include_folders() -> list[Path]:
    """Return the folders of the C headers that were installed with torch, or none.

    Triton's folder has a CUDA runtime as well. It is last because it may be of another version,
    and it is needed because NVIDIA's packages for CUDA 12 lack the headers of the compiler.
    """
    packages = Path(torch.__file__).parents[1]
    folders = [*packages.glob("nvidia/*/include"), *packages.glob("triton/backends/nvidia/include")]
    has_runtime = any((folder / "cuda_runtime_api.h").is_file() for folder in folders)
    return folders if has_runtime else []


def compile_in(folder: Path) -> None:
    """Compile the sources to `folder / LIBRARY`. Intermediate files stay beside it."""
    runtime, stubs = folder / "runtime.o", folder / "stubs.cpp"
    include = [f"-isystem{path}" for path in include_folders()]
    subprocess.run([*COMPILER, *include, "-c", SOURCE, "-o", runtime], check=True)

    libraries = Path(torch.__file__).parent.joinpath("lib").glob("*.so")
    imported = set(IMPORT.findall(symbols("--dynamic", "--undefined-only", *libraries)))
    defined = set(DEFINITION.findall(symbols("--defined-only", runtime)))
    missing = sorted(imported - defined)
    stubs.write_text("".join(f'extern "C" int {name}() {{ return 0; }}\n' for name in missing))

    output = ["-shared", f"-Wl,-soname,{LIBRARY}", "-o", folder / LIBRARY]
    subprocess.run([*COMPILER, runtime, stubs, *output], check=True)


def symbols(*arguments: str | Path) -> str:
    """Return what `nm` lists, one symbol a line: address, type (U: import, T: function), name."""
    return subprocess.run(["nm", *arguments], capture_output=True, text=True, check=True).stdout
