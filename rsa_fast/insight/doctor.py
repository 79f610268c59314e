"""Is this machine fit to train? Versions, GPUs, limits and disks, each with what to do about it.

    checks = diagnose(data=Path("data/imagenet"), out=Path("runs"))

A check is a function of the facts it is given; only `diagnose` and the `read_` functions look at the machine. Versions are
strings, None where there is none; `gpus` is a count, or a list of names and compute capabilities.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import distributions, metadata
from pathlib import Path
from typing import Any, Literal

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

PIP = f"{sys.executable} -m pip"
TORCH_PIN = f"{PIP} install torch==2.10.0+{{0}} torchvision==0.25.0+{{0}} --index-url https://download.pytorch.org/whl/{{0}}"
PIN_ARCHS = (
    "sm_70",
    "sm_75",
    "sm_80",
    "sm_86",
    "sm_90",
    "sm_100",
    "sm_120",
)  # of cu128; torch 2.11's begin at sm_75
HEADERS = {
    "opencv4": "libopencv-dev",
    "libturbojpeg": "libturbojpeg0-dev",
}  # what FFCV compiles with: pkg-config, Debian
EXTRAS = ("tensorboard", "wandb", "onnx", "pycocotools")
GIB = 2**30
IMAGENET_GIB = 144  # 147.9 and 6.7 GB: ILSVRC2012_img_train.tar and _val.tar, and as much again the files in them
CHECKPOINT_GIB = 0.4  # ResNet-50 RSA: 35 M parameters online, 33 M target, 35 M momentum, in fp32
BATCH_GIB = 256 * 4 * 3 * 224**2 * 2 / GIB  # a rank's four views, ImageNet-1K on 8 GPUs in fp16

Gpu = tuple[str, tuple[int, int]]
Status = Literal["ok", "warning", "fail"]

STATUSES: dict[Status, str] = {  # from best to worst, with their colours
    "ok": "green",
    "warning": "yellow",
    "fail": "bold red",
}


@dataclass(frozen=True)
class Check:
    """One finding, and the command or action that mends it, empty where nothing is to be done."""

    name: str
    status: Status
    found: str
    fix: str = ""


def judge(name: str, found: str, *faults: tuple[object, Status, str]) -> Check:
    """A check by the first of the faults (is it so, status, fix) that is so; ok without any."""
    return next(
        (Check(name, status, found, fix) for so, status, fix in faults if so),
        Check(name, "ok", found),
    )


def check_python(version: str, wanted: str) -> Check:
    """`wanted` as in requires-python."""
    fix = f"make PYTHON=/path/to/python setup, with Python {wanted}"
    return judge(
        "Python", f"{version}, wanted {wanted}", (version not in SpecifierSet(wanted), "fail", fix)
    )


def reach(archs: Iterable[str], capability: tuple[int, int]) -> Status:
    """How code compiled for `archs` runs on a GPU: ok, as a binary; warning, as PTX that the driver compiles; fail.

    `sm_XY` runs on X.Y and later minor versions of X, `compute_XY` on X.Y and everything later; with the suffix a on X.Y
    alone, with f within X (CUDA programming guide, compute capability).
    Raises ValueError for any other name.
    """
    ways: set[Status] = {"fail"}
    for arch in archs:
        if not (name := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)):
            raise ValueError(f"no architecture {arch!r}: wanted names such as sm_80, compute_90")
        kind, major, minor, suffix = name.groups()
        built = int(major), int(minor)
        same_major = built[0] == capability[0] or (kind == "compute" and not suffix)
        if built == capability or (same_major and built < capability and suffix != "a"):
            ways.add("ok" if kind == "sm" else "warning")
    return min(ways, key=list(STATUSES).index)


def check_architectures(archs: list[str], gpus: list[Gpu]) -> Check:
    """`archs` as torch.cuda.get_arch_list() names them. The fix is for the GPU that is worst off."""
    cards = ", ".join(
        f"{count} x {name} (sm_{x}{y})" for (name, (x, y)), count in Counter(gpus).items()
    )
    found = f"{cards or 'no GPU, training runs on the CPU'}; torch has {', '.join(archs) or 'no GPU code'}"
    if not gpus:
        return judge("GPU architectures", found)
    worst = max(
        (capability for _, capability in gpus), key=lambda c: list(STATUSES).index(reach(archs, c))
    )
    status = reach(archs, worst)
    if status != "ok":
        found += f": {'nothing' if status == 'fail' else 'only PTX'} for sm_{worst[0]}{worst[1]}"
    older, newer = TORCH_PIN.format("cu126"), f"{PIP} install --upgrade torch torchvision"
    fix = (
        TORCH_PIN.format("cu128")
        if reach(PIN_ARCHS, worst) == "ok"
        else older
        if worst < (7, 0)
        else newer
    )
    return judge("GPU architectures", found, (status != "ok", status, fix))


def check_driver(driver: str | None, torch_cuda: str | None, gpus: int, cards: int) -> Check:
    """`driver` is the CUDA it serves, with all before; of later minor versions it serves the binaries, not the PTX (CUDA
    compatibility guide). `gpus` are those it shows, `cards` those on the PCI bus."""
    served, wanted = Version(driver or "0"), Version(torch_cuda or "0")
    serves = f"serves CUDA {driver}" if driver else "none"
    newer = f"install a driver for which nvidia-smi shows CUDA {wanted} or later; V100: branch 580 is the last"
    return judge(
        "NVIDIA driver",
        f"{serves}; {gpus} GPU(s) visible, {cards} on the PCI bus; torch is for CUDA {torch_cuda}",
        (
            cards and not driver,
            "fail",
            "install the NVIDIA driver; in a container: docker run --gpus all",
        ),
        (driver and served.major < wanted.major, "fail", newer),
        (
            cards and not gpus,
            "warning",
            "look at CUDA_VISIBLE_DEVICES, nvidia-smi, dmesg; V100: driver branch 580 is the last",
        ),
        (driver and served < wanted, "warning", newer),
    )


def check_dali(installed: dict[str, str], torch_cuda: str | None, gpus: int) -> Check:
    """`installed`: versions by the names of DALI's packages, such as nvidia-dali-cuda120."""
    wanted = f"nvidia-dali-cuda{Version(torch_cuda or '12').major}0"
    found = (
        ", ".join(f"{name} {version}" for name, version in installed.items())
        or "absent, the native backend decodes"
    )
    other = f"{PIP} uninstall -y {' '.join(installed)} && {PIP} install {wanted}"
    return judge(
        "DALI",
        f"{found}; torch is for CUDA {torch_cuda}",
        (installed and torch_cuda and set(installed) != {wanted}, "fail", other),
        (gpus and not installed, "warning", f"{PIP} install {wanted}"),
    )


def check_nccl(loaded: str | None, shipped: str | None, gpus: int) -> Check:
    """`loaded` is the version that answers, `shipped` that of the package torch was installed with, if it was."""
    return judge(
        "NCCL",
        f"{loaded or 'none'} is loaded, torch came with {shipped or 'none'}; {gpus} GPU(s)",
        (gpus > 1 and not loaded, "fail", TORCH_PIN.format("cu128")),
        (
            loaded and shipped and loaded != shipped,
            "warning",
            "take the other libnccl out of LD_LIBRARY_PATH and LD_PRELOAD",
        ),
    )


def check_ffcv(version: str | None, error: str, missing: list[str]) -> Check:
    """`error` of its import, empty if there is none; `missing`: the Debian packages that compiling FFCV needs."""
    apt = f"sudo apt-get install -y {' '.join(missing)} && " if missing else ""
    return judge(
        "FFCV",
        f"{version or 'absent, the other backends work without'}{error and f', does not import: {error}'}",
        (not version, "warning", f"{apt}{PIP} install ffcv"),
        (error, "fail", f"{apt}{PIP} install --force-reinstall --no-deps --no-cache-dir ffcv"),
    )


def check_numba_cache(folder: str, error: str) -> Check:
    """`folder` numba chose for compiled kernels; `error` if it found none that can be written."""
    return judge(
        "numba cache", error or folder, (error, "fail", "export NUMBA_CACHE_DIR=/a/writable/folder")
    )


def check_cpu(capability: str, bf16: bool, gpus: int) -> Check:
    """`capability` of torch's kernels, in its words."""
    return judge(
        "CPU",
        f"torch's kernels: {capability}; on the CPU, training in {'bf16' if bf16 else 'fp32 (no avx512_bf16)'}",
        (
            capability in ("DEFAULT", "NO AVX"),
            "warning",
            "unset ATEN_CPU_CAPABILITY, or take a CPU with AVX2",
        ),
        (not bf16 and not gpus, "warning", "a CPU with avx512_bf16 trains in bf16, twice as fast"),
    )


def check_threads(threads: int, cores: int, allowed: int, quota: float) -> Check:
    """`threads` of torch, the machine's `cores`, those the affinity `allowed`, and the cgroup's `quota` in cores."""
    usable = max(1, min(allowed, quota))
    found = f"torch takes {threads}, {usable:g} of {cores} cores usable (affinity {allowed}, cgroup quota {quota:g})"
    return judge(
        "threads", found, (threads > usable, "warning", f"export OMP_NUM_THREADS={int(usable)}")
    )


def check_shared_memory(free_gib: float, gpus: int) -> Check:
    """A rank's two worker processes of the torchvision backend make two batches ahead each; NCCL's guide asks for 1 GiB."""
    wanted_gib = 4 * BATCH_GIB * max(1, gpus)
    found = f"{free_gib:.2f} GiB free in /dev/shm; the torchvision backend takes {wanted_gib:.1f} on ImageNet"
    size = math.ceil(wanted_gib)
    fix = f"docker run --shm-size={size}g; outside a container: sudo mount -o remount,size={size}G /dev/shm"
    return judge(
        "shared memory",
        found,
        (gpus > 1 and free_gib < 1, "fail", fix),
        (free_gib < wanted_gib, "warning", fix),
    )


def check_open_files(soft: float, hard: float, workers: int) -> Check:
    """The torchvision backend holds 14 open and 10 more per worker process (measured); 1024 is what Linux gives."""
    wanted = max(1024, 14 + 10 * workers)
    fix = (
        f"ulimit -n {wanted}"
        if hard >= wanted
        else f"as root: nofile {wanted} in /etc/security/limits.conf"
    )
    return judge(
        "open files",
        f"{soft:g} at once, hard limit {hard:g}, wanted {wanted}",
        (soft < wanted, "warning", fix),
    )


def check_out_disk(free_gib: float, writable: bool) -> Check:
    """Two checkpoints are kept while a third is written."""
    return judge(
        "disk of --out",
        f"{free_gib:.1f} GiB free{'' if writable else ', not writable'}; a ResNet-50 checkpoint takes {CHECKPOINT_GIB}",
        (not writable or free_gib < CHECKPOINT_GIB, "fail", "free space, or choose another --out"),
        (free_gib < 3 * CHECKPOINT_GIB, "warning", "free space, or choose another --out"),
    )


def check_data_disk(free_gib: float, held_gib: float) -> Check:
    """`held_gib` of files are in the data folder."""
    held = f"{held_gib:.1f} GiB" if held_gib else "nothing"
    found = f"{held} there, {free_gib:.1f} GiB free; ImageNet-1K takes {IMAGENET_GIB}, and as much again its tar files"
    fix = "for ImageNet-1K, choose another --data, or have its tar files elsewhere"
    return judge(
        "disk of --data", found, (not held_gib and free_gib < 2 * IMAGENET_GIB, "warning", fix)
    )


def check_page_cache(held_gib: float, memory_gib: float) -> Check:
    """Files stay in memory from one epoch to the next if four fifths of it hold them all; ImageNet's, where none are yet."""
    data = f"{held_gib:.1f} GiB" if held_gib else f"{IMAGENET_GIB} GiB of ImageNet-1K"
    fix = "a local NVMe disk, or smaller files: python -m tools.to_ffcv DATA OUT --write-mode jpg --max-resolution 400"
    too_large = (held_gib or IMAGENET_GIB) > 0.8 * memory_gib
    return judge(
        "page cache", f"{data} in {memory_gib:.1f} GiB of memory", (too_large, "warning", fix)
    )


def check_extras(installed: dict[str, str]) -> Check:
    """Training needs none of them: an absent one is named and no fault."""
    found = ", ".join(f"{name} {installed.get(name, 'absent')}" for name in EXTRAS)
    absent = [name for name in EXTRAS if name not in installed]
    return judge("optional packages", found, (absent, "ok", f"{PIP} install {' '.join(absent)}"))


def read_driver(library: str = "libcuda.so.1") -> tuple[str | None, list[Gpu]]:
    """The CUDA version the driver serves and the GPUs it shows, by the driver's own word: torch knows neither when the
    driver is too old for it."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return None, []

    def ask(function: str, *arguments: int) -> int:
        value = ctypes.c_int()
        getattr(driver, function)(ctypes.byref(value), *arguments)
        return value.value

    def gpu(device: int) -> Gpu:
        name = ctypes.create_string_buffer(256)
        driver.cuDeviceGetName(name, len(name), device)
        return name.value.decode(), (
            ask("cuDeviceGetAttribute", 75, device),
            ask("cuDeviceGetAttribute", 76, device),
        )

    driver.cuInit(0)  # where it fails, no GPU is counted
    version = ask(
        "cuDriverGetVersion"
    )  # 12080 is 12.8; 0 from the stub of CUDA's development images
    gpus = [gpu(ask("cuDeviceGet", i)) for i in range(ask("cuDeviceGetCount"))]
    return f"{version // 1000}.{version % 1000 // 10}" if version else None, gpus


def read_cards(bus: Path = Path("/sys/bus/pci/devices")) -> int:
    """NVIDIA's display controllers on the PCI bus, with or without a driver."""
    devices = [
        ((card / "vendor").read_text(), (card / "class").read_text()) for card in bus.glob("*")
    ]
    return sum(vendor.startswith("0x10de") and kind.startswith("0x03") for vendor, kind in devices)


def read_cgroups(groups: str, root: Path = Path("/sys/fs/cgroup")) -> tuple[float, float]:
    """Cores and bytes of memory that the cgroups of /proc/self/cgroup, v1 or v2, and their parents leave this process."""

    def numbers(folder: Path, *files: str) -> list[float]:
        words = " ".join(
            (folder / file).read_text() for file in files if (folder / file).is_file()
        ).split()
        return [
            float(word) if word.isdigit() and word != "0" else math.inf for word in words
        ]  # no limit: max, -1 or 0

    cores = memory = math.inf
    for _, controllers, group in (line.split(":", 2) for line in groups.splitlines()):
        for path in (Path(group), *Path(group).parents):
            folder = root / controllers / path.relative_to("/")
            quota, period = numbers(folder, "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us") or (
                math.inf,
                1,
            )
            cores = min(cores, quota / period)
            memory = min(memory, *numbers(folder, "memory.max", "memory.limit_in_bytes"), math.inf)
    return cores, memory


def read_missing() -> list[str]:
    """The Debian packages that compiling FFCV needs and that are not installed."""
    tools = [tool for tool in ("g++", "pkg-config") if not shutil.which(tool)]
    exists = ("pkg-config", "--exists")
    return tools + [
        HEADERS[h]
        for h in HEADERS
        if "pkg-config" in tools or subprocess.run([*exists, h]).returncode
    ]


def import_error(module: str) -> str:
    """What importing a module raises; empty if it imports."""
    try:
        import_module(module)
    except Exception as error:  # a broken build raises anything
        return f"{type(error).__name__}: {error}"
    return ""


def diagnose(data: Path, out: Path) -> list[Check]:
    """Every check of this machine, in the order to mend things in; the folders `data` and `out` need not exist yet."""
    python = check_python(platform.python_version(), metadata("rsa-fast")["Requires-Python"])
    if error := import_error("torch"):
        return [python, Check("torch", "fail", error, "make setup")]
    import torch

    packages = {package.name: package.version for package in distributions()}
    cuda = torch.version.cuda
    # torch.cuda.get_arch_list() is empty where torch finds no GPU.
    archs = (torch._C._cuda_getArchFlags() or "").split() if cuda else []
    nccl = None
    if torch.distributed.is_nccl_available():
        numbers = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]  # torch gives no types
        nccl = ".".join(map(str, numbers))
    driver, gpus = read_driver()
    allowed, (quota, memory) = (
        len(os.sched_getaffinity(0)),
        read_cgroups(Path("/proc/self/cgroup").read_text()),
    )
    memory = min(memory, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    soft, hard = (
        math.inf if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    places = [
        next(p for p in (folder, *folder.parents) if p.exists())
        for folder in (out.absolute(), data.absolute())
    ]
    shm_gib, out_gib, data_gib = (
        shutil.disk_usage(place).free / GIB for place in (Path("/dev/shm"), *places)
    )
    files = (
        os.path.join(place, name)
        for place, _, names in os.walk(data, followlinks=True)
        for name in names
    )
    held_gib = sum(os.path.getsize(file) for file in files if os.path.isfile(file)) / GIB
    uncached = import_error("pipelines.host_ops")
    cache = "" if uncached else sys.modules["pipelines.host_ops"].sample_views.stats.cache_path
    return [
        python,
        check_cpu(
            torch.backends.cpu.get_cpu_capability(),
            torch.cpu._is_avx512_bf16_supported(),
            len(gpus),
        ),
        check_threads(torch.get_num_threads(), os.cpu_count() or 1, allowed, quota),
        check_driver(driver, cuda, len(gpus), read_cards()),
        check_architectures(archs, gpus),
        check_nccl(nccl, packages.get(f"nvidia-nccl-cu{Version(cuda or '0').major}"), len(gpus)),
        check_dali(
            {name: packages[name] for name in packages if name.startswith("nvidia-dali-cuda")},
            cuda,
            len(gpus),
        ),
        check_ffcv(
            packages.get("ffcv"),
            import_error("pipelines.ffcv_views") if "ffcv" in packages else "",
            read_missing(),
        ),
        check_numba_cache(cache, uncached),
        check_shared_memory(shm_gib, len(gpus)),
        check_open_files(soft, hard, workers=allowed),
        check_out_disk(out_gib, os.access(places[0], os.W_OK)),
        check_data_disk(data_gib, held_gib),
        check_page_cache(held_gib, memory / GIB),
        check_extras(packages),
    ]


def report(checks: list[Check]) -> dict[str, Any]:
    """`{"ok": ..., "checks": [...]}`: ok if no check failed; warnings do not count."""
    return {
        "ok": all(check.status != "fail" for check in checks),
        "checks": [asdict(check) for check in checks],
    }


def show(checks: list[Check]) -> None:
    """The checks as a table on stdout."""
    table = Table(
        "check", "", Column("found", overflow="fold"), Column("what to do", overflow="fold")
    )
    for check in checks:
        table.add_row(
            check.name,
            Text(check.status, STATUSES[check.status]),
            Text(check.found),
            Text(check.fix),
        )
    Console().print(table)
