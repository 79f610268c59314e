"""Check whether this machine can train: versions, GPUs, limits and disks.

    checks = diagnose(data=Path("data/imagenet"), out=Path("runs"))

Every finding comes with advice. A check depends only on its arguments. Only `diagnose` and the
`read_` functions look at the machine. Versions are strings, or None if nothing is installed. `gpus`
is a count, or a list of names and compute capabilities.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import pwd
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

from rsa_fast.pipelines.machine import PIP, read_cgroups

GIB = 2**30
TORCH_PIN = (
    f"{PIP} install torch==2.10.0+{{0}} torchvision==0.25.0+{{0}} "
    "--index-url https://download.pytorch.org/whl/{0}"
)
# The architectures of TORCH_PIN with cu128. Those of torch 2.11 begin at sm_75.
PIN_ARCHS = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
# The libraries that compiling FFCV needs: their names for pkg-config, and Debian's packages.
HEADERS = {"opencv4": "libopencv-dev", "libturbojpeg": "libturbojpeg0-dev"}
EXTRAS = ("tensorboard", "wandb", "onnx", "pycocotools")
# ILSVRC2012_img_train.tar and _val.tar are 147.9 and 6.7 GB. The files in them take the same space.
IMAGENET_GIB = 144
# RSA with a ResNet-50 in fp32 has 35 M online parameters, 33 M target parameters and 35 M momenta.
CHECKPOINT_GIB = 0.4
# The four views of a rank, for ImageNet-1K on 8 GPUs in fp16.
BATCH_GIB = 256 * 4 * 3 * 224**2 * 2 / GIB

DetectedGpu = tuple[str, tuple[int, int]]  # name, compute capability
Status = Literal["ok", "warning", "fail"]

# All statuses from best to worst, with their colours.
STATUSES: dict[Status, str] = {"ok": "green", "warning": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Check:
    """One finding and the command or action that fixes it, which may be empty."""

    name: str
    status: Status
    found: str
    fix: str = ""


def make_check(name: str, found: str, *faults: tuple[object, Status, str]) -> Check:
    """Make a check with the status and fix of the first fault whose condition is true, or ok.

    A fault is (condition, status, fix).
    """
    for condition, status, fix in faults:
        if condition:
            return Check(name, status, found, fix)
    return Check(name, "ok", found)


def check_python(version: str, required: str) -> Check:
    """`required` is a specifier as in requires-python."""
    unsupported = version not in SpecifierSet(required)
    fix = f"make PYTHON=/path/to/python setup, with Python {required}"
    return make_check("Python", f"{version}, wanted {required}", (unsupported, "fail", fix))


def arch_status(archs: Iterable[str], capability: tuple[int, int]) -> Status:
    """The status of code that is compiled for `archs` on a GPU of this compute capability.

    "ok" means that it runs as a binary, "warning" that it runs as PTX, which the driver compiles,
    and "fail" that it does not run. `sm_XY` runs on X.Y and later minor versions of X. `compute_XY`
    runs on X.Y and everything later. With the suffix a, both run on X.Y only. With the suffix f,
    both run within X (CUDA programming guide, compute capability).

    Raises ValueError for any other name.
    """
    statuses: set[Status] = {"fail"}
    for arch in archs:
        if not (name := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)):
            raise ValueError(f"no architecture {arch!r}: use names such as sm_80, compute_90")
        kind, major, minor, suffix = name.groups()
        built_for = int(major), int(minor)
        same_major = built_for[0] == capability[0] or (kind == "compute" and not suffix)
        if built_for == capability or (same_major and built_for < capability and suffix != "a"):
            statuses.add("ok" if kind == "sm" else "warning")
    return min(statuses, key=list(STATUSES).index)


def check_architectures(archs: list[str], gpus: list[DetectedGpu]) -> Check:
    """`archs` are those of torch.cuda.get_arch_list(). The fix is for the worst supported GPU."""
    counts = Counter(gpus)
    cards = ", ".join(f"{n} x {name} (sm_{x}{y})" for (name, (x, y)), n in counts.items())
    found = (
        f"{cards or 'no GPU, training runs on the CPU'}; "
        f"torch has {', '.join(archs) or 'no GPU code'}"
    )
    if not gpus:
        return make_check("GPU architectures", found)
    severity = list(STATUSES).index
    capabilities = [capability for _, capability in gpus]
    worst = max(capabilities, key=lambda capability: severity(arch_status(archs, capability)))
    status = arch_status(archs, worst)
    if status != "ok":
        found += f": {'nothing' if status == 'fail' else 'only PTX'} for sm_{worst[0]}{worst[1]}"
    if arch_status(PIN_ARCHS, worst) == "ok":
        fix = TORCH_PIN.format("cu128")
    elif worst < (7, 0):
        fix = TORCH_PIN.format("cu126")
    else:
        fix = f"{PIP} install --upgrade torch torchvision"
    return make_check("GPU architectures", found, (status != "ok", status, fix))


def check_driver(driver: str | None, torch_cuda: str | None, gpus: int, cards: int) -> Check:
    """`driver` is the CUDA version that the driver supports.

    It shows `gpus` GPUs, and `cards` cards are on the PCI bus. A driver also supports all earlier
    versions. For later minor versions, it supports the binaries but not the PTX (CUDA compatibility
    guide).
    """
    served = Version(driver or "0")
    required = Version(torch_cuda or "0")
    upgrade = (
        f"install a driver for which nvidia-smi shows CUDA {required} or later; "
        "V100: branch 580 is the last"
    )
    install = "install the NVIDIA driver; in a container: docker run --gpus all"
    look = "look at CUDA_VISIBLE_DEVICES, nvidia-smi, dmesg; V100: driver branch 580 is the last"
    return make_check(
        "NVIDIA driver",
        f"{f'serves CUDA {driver}' if driver else 'none'}; {gpus} GPU(s) visible, "
        f"{cards} on the PCI bus; torch is for CUDA {torch_cuda}",
        (cards and not driver, "fail", install),
        (driver and served.major < required.major, "fail", upgrade),
        (cards and not gpus, "warning", look),
        (driver and served < required, "warning", upgrade),
    )


def check_dali(installed: dict[str, str], torch_cuda: str | None, gpus: int) -> Check:
    """`installed` maps DALI's packages, such as nvidia-dali-cuda120, to their versions."""
    package = f"nvidia-dali-cuda{Version(torch_cuda or '12').major}0"
    names = ", ".join(f"{name} {version}" for name, version in installed.items())
    replace = f"{PIP} uninstall -y {' '.join(installed)} && {PIP} install {package}"
    return make_check(
        "DALI",
        f"{names or 'absent, the native backend decodes'}; torch is for CUDA {torch_cuda}",
        (installed and torch_cuda and set(installed) != {package}, "fail", replace),
        (gpus and not installed, "warning", f"{PIP} install {package}"),
    )


def check_nccl(loaded: str | None, shipped: str | None, gpus: int) -> Check:
    """`loaded` is the version in use, and `shipped` is that of the package installed with torch."""
    remove = "remove the other libnccl from LD_LIBRARY_PATH and LD_PRELOAD"
    return make_check(
        "NCCL",
        f"{loaded or 'none'} is loaded, torch came with {shipped or 'none'}; {gpus} GPU(s)",
        (gpus > 1 and not loaded, "fail", TORCH_PIN.format("cu128")),
        (loaded and shipped and loaded != shipped, "warning", remove),
    )


def check_ffcv(version: str | None, error: str, missing: list[str]) -> Check:
    """`error` is that of its import, or empty. `missing` are Debian packages to compile it."""
    apt = f"sudo apt-get install -y {' '.join(missing)} && " if missing else ""
    reinstall = f"{apt}{PIP} install --force-reinstall --no-deps --no-cache-dir ffcv"
    found = version or "absent, but the other backends do not need it"
    if error:
        found += f", cannot be imported: {error}"
    return make_check(
        "FFCV",
        found,
        (not version, "warning", f"{apt}{PIP} install ffcv"),
        (error, "fail", reinstall),
    )


def check_numba_cache(folder: str, error: str) -> Check:
    """`folder` is numba's cache of compiled kernels, or empty. An `error` is fatal."""
    fix = "export NUMBA_CACHE_DIR=/a/writable/folder"
    found = error or folder or "no writable folder: every start compiles the kernels again"
    return make_check("numba cache", found, (error, "fail", fix), (not folder, "warning", fix))


def check_user(user_id: int, name: str, home: str, writable: bool) -> Check:
    """`name` is the user's name in the password database, or empty.

    `home` is "~" if it is unknown. wandb and torch.hub store settings and caches in the home.
    """
    return make_check(
        "user",
        f"{name or f'number {user_id}, which has no name'}; "
        f"home {home}{'' if writable else ', not writable'}",
        (not writable, "warning", "export HOME=/a/writable/folder"),
    )


def check_cpu(capability: str, bf16: bool, gpus: int) -> Check:
    """`capability` is the instruction set of torch's kernels, as torch names it."""
    unset = "unset ATEN_CPU_CAPABILITY, or use a CPU with AVX2"
    precision = "bf16" if bf16 else "fp32 (no avx512_bf16)"
    return make_check(
        "CPU",
        f"torch's kernels: {capability}; on the CPU, training in {precision}",
        (capability in ("DEFAULT", "NO AVX"), "warning", unset),
        (not bf16 and not gpus, "warning", "a CPU with avx512_bf16 trains in bf16, twice as fast"),
    )


def check_threads(threads: int, cores: int, allowed: int, quota: float) -> Check:
    """`threads` is the number of torch's threads, and `cores` that of the machine's cores.

    The affinity permits `allowed` of the cores, and the cgroup permits `quota`.
    """
    usable = max(1, min(allowed, quota))
    found = (
        f"torch uses {threads} threads, {usable:g} of {cores} cores are usable (affinity "
        f"{allowed}, cgroup quota {quota:g})"
    )
    fix = f"export OMP_NUM_THREADS={int(usable)}"
    return make_check("threads", found, (threads > usable, "warning", fix))


def check_shared_memory(free_gib: float, gpus: int) -> Check:
    """Each rank needs room for four batches in /dev/shm.

    The torchvision backend has two worker processes, which prefetch two batches each. NCCL's guide
    asks for 1 GiB.
    """
    needed_gib = 4 * BATCH_GIB * max(1, gpus)
    size = math.ceil(needed_gib)
    fix = (
        f"docker run --shm-size={size}g; "
        f"outside a container: sudo mount -o remount,size={size}G /dev/shm"
    )
    return make_check(
        "shared memory",
        f"{free_gib:.2f} GiB free in /dev/shm; "
        f"the torchvision backend takes {needed_gib:.1f} on ImageNet",
        (gpus > 1 and free_gib < 1, "fail", fix),
        (free_gib < needed_gib, "warning", fix),
    )


def check_open_files(soft: float, hard: float, workers: int) -> Check:
    """The torchvision backend has 14 open files, and 10 more per worker process (measured).

    1024 is Linux's default.
    """
    needed = max(1024, 14 + 10 * workers)
    fix = f"ulimit -n {needed}"
    if hard < needed:
        fix = f"as root: nofile {needed} in /etc/security/limits.conf"
    found = f"limit {soft:g}, hard limit {hard:g}, needed {needed}"
    return make_check("open files", found, (soft < needed, "warning", fix))


def check_out_disk(free_gib: float, writable: bool) -> Check:
    """Two checkpoints stay on the disk while a third is written."""
    fix = "free space, or choose another --out"
    return make_check(
        "disk of --out",
        f"{free_gib:.1f} GiB free{'' if writable else ', not writable'}; "
        f"a ResNet-50 checkpoint takes {CHECKPOINT_GIB}",
        (not writable or free_gib < CHECKPOINT_GIB, "fail", fix),
        (free_gib < 3 * CHECKPOINT_GIB, "warning", fix),
    )


def check_data_disk(free_gib: float, data_gib: float) -> Check:
    """`data_gib` is the size of the files in the data folder."""
    data = f"{data_gib:.1f} GiB" if data_gib else "nothing"
    return make_check(
        "disk of --data",
        f"{data} there, {free_gib:.1f} GiB free; ImageNet-1K takes {IMAGENET_GIB}, and its tar "
        "files take the same",
        (
            not data_gib and free_gib < 2 * IMAGENET_GIB,
            "warning",
            "for ImageNet-1K, choose another --data, or store its tar files elsewhere",
        ),
    )


def check_page_cache(data_gib: float, memory_gib: float) -> Check:
    """Files stay in memory from one epoch to the next if they take at most four fifths of it.

    If there are no files yet, the size of ImageNet is used.
    """
    data = f"{data_gib:.1f} GiB" if data_gib else f"{IMAGENET_GIB} GiB of ImageNet-1K"
    too_large = (data_gib or IMAGENET_GIB) > 0.8 * memory_gib
    fix = (
        "a local NVMe disk (rsa-fast stage DATA OUT), or smaller files: "
        "rsa-fast convert ffcv DATA OUT --write-mode jpg --max-resolution 400; on a disk limited "
        "in reads per second (a hard disk, an array, a network disk), packed files with "
        "--set order=blocks: 3,200 instead of 564 images/s at 500 reads per second"
    )
    found = f"{data} in {memory_gib:.1f} GiB of memory"
    return make_check("page cache", found, (too_large, "warning", fix))


def check_extras(installed: dict[str, str]) -> Check:
    """Training needs none of these packages. Absent ones are listed, but are not a fault."""
    found = ", ".join(f"{name} {installed.get(name, 'absent')}" for name in EXTRAS)
    absent = [name for name in EXTRAS if name not in installed]
    fix = f"{PIP} install {' '.join(absent)}"
    return make_check("optional packages", found, (absent, "ok", fix))


def read_driver(library: str = "libcuda.so.1") -> tuple[str | None, list[DetectedGpu]]:
    """The CUDA version that the driver supports, and the GPUs that it shows.

    This asks the driver itself, because torch knows neither if the driver is too old for it.
    """
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return None, []

    def ask(function: str, *arguments: int) -> int:
        value = ctypes.c_int()
        getattr(driver, function)(ctypes.byref(value), *arguments)
        return value.value

    def read_gpu(device: int) -> DetectedGpu:
        name = ctypes.create_string_buffer(256)
        driver.cuDeviceGetName(name, len(name), device)
        major = ask("cuDeviceGetAttribute", 75, device)
        minor = ask("cuDeviceGetAttribute", 76, device)
        return name.value.decode(), (major, minor)

    driver.cuInit(0)  # if it fails, no GPU is counted below
    version = ask("cuDriverGetVersion")  # 12080 means 12.8, and the stub in CUDA's images returns 0
    gpus = [read_gpu(ask("cuDeviceGet", i)) for i in range(ask("cuDeviceGetCount"))]
    return f"{version // 1000}.{version % 1000 // 10}" if version else None, gpus


def read_cards(bus: Path = Path("/sys/bus/pci/devices")) -> int:
    """The number of NVIDIA's display controllers on the PCI bus, with or without a driver."""
    devices = [
        ((card / "vendor").read_text(), (card / "class").read_text()) for card in bus.glob("*")
    ]
    return sum(vendor.startswith("0x10de") and kind.startswith("0x03") for vendor, kind in devices)


def read_memory_bytes() -> float:
    """The memory that this process may use: that of the machine, or the limit of a cgroup."""
    _, limit = read_cgroups(Path("/proc/self/cgroup").read_text())
    return min(limit, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def read_folder_gib(folder: Path) -> float:
    """The size of all files below a folder, which may be missing. Symbolic links are followed."""
    paths = (
        os.path.join(place, name)
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
    )
    return sum(os.path.getsize(path) for path in paths if os.path.isfile(path)) / GIB


def read_free_gib(folder: Path) -> float:
    return shutil.disk_usage(folder).free / GIB


def read_missing_packages() -> list[str]:
    """The Debian packages that compiling FFCV needs and that are not installed."""
    missing = [tool for tool in ("g++", "pkg-config") if not shutil.which(tool)]
    for library, package in HEADERS.items():
        if (
            "pkg-config" in missing
            or subprocess.run(["pkg-config", "--exists", library]).returncode
        ):
            missing.append(package)
    return missing


def import_error(module: str) -> str:
    """The error that importing a module raises, or "" if it can be imported."""
    try:
        import_module(module)
    except Exception as error:  # a broken build can raise any exception
        return f"{type(error).__name__}: {error}"
    return ""


def diagnose(data: str | Path, out: str | Path) -> list[Check]:
    """All checks of this machine, in the order in which faults should be fixed.

    The folders `data` and `out` may not exist yet.
    """
    data, out = Path(data), Path(out)
    python = check_python(platform.python_version(), metadata("rsa-fast")["Requires-Python"])
    if error := import_error("torch"):
        return [python, Check("torch", "fail", error, "make setup")]
    import torch

    packages = {package.name: package.version for package in distributions()}
    driver, gpus = read_driver()
    cpu = torch.backends.cpu.get_cpu_capability()
    cores, _ = read_cgroups(Path("/proc/self/cgroup").read_text())
    allowed = len(os.sched_getaffinity(0))
    uncached = import_error("rsa_fast.pipelines.host_ops")
    cache = (
        "" if uncached else sys.modules["rsa_fast.pipelines.host_ops"].sample_views.stats.cache_path
    )
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = ""
    home = os.path.expanduser("~")
    soft, hard = (
        math.inf if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    out_place, data_place = existing_parent(out), existing_parent(data)
    data_gib = read_folder_gib(data)
    return [
        python,
        check_cpu(cpu, torch.cpu._is_avx512_bf16_supported(), len(gpus)),
        check_threads(torch.get_num_threads(), os.cpu_count() or 1, allowed, cores),
        *diagnose_gpu_libraries(packages, driver, gpus),
        check_numba_cache(cache or "", uncached),
        check_user(os.getuid(), user, home, os.path.isabs(home) and os.access(home, os.W_OK)),
        check_shared_memory(read_free_gib(Path("/dev/shm")), len(gpus)),
        check_open_files(soft, hard, workers=allowed),
        check_out_disk(read_free_gib(out_place), os.access(out_place, os.W_OK)),
        check_data_disk(read_free_gib(data_place), data_gib),
        check_page_cache(data_gib, read_memory_bytes() / GIB),
        check_extras(packages),
    ]


def diagnose_gpu_libraries(
    packages: dict[str, str], driver: str | None, gpus: list[DetectedGpu]
) -> list[Check]:
    """The driver, torch's GPU code, NCCL, DALI and FFCV. `packages` has all installed versions."""
    import torch

    cuda = torch.version.cuda
    # torch.cuda.get_arch_list() is empty if torch finds no GPU.
    archs = (torch._C._cuda_getArchFlags() or "").split() if cuda else []
    nccl = None
    if torch.distributed.is_nccl_available():
        numbers = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]  # torch gives no types
        nccl = ".".join(map(str, numbers))
    shipped_nccl = packages.get(f"nvidia-nccl-cu{Version(cuda or '0').major}")
    dali = {name: packages[name] for name in packages if name.startswith("nvidia-dali-cuda")}
    ffcv_error = import_error("rsa_fast.pipelines.ffcv_views") if "ffcv" in packages else ""
    return [
        check_driver(driver, cuda, len(gpus), read_cards()),
        check_architectures(archs, gpus),
        check_nccl(nccl, shipped_nccl, len(gpus)),
        check_dali(dali, cuda, len(gpus)),
        check_ffcv(packages.get("ffcv"), ffcv_error, read_missing_packages()),
    ]


def existing_parent(folder: Path) -> Path:
    """The folder, or the nearest folder above it that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def summary(checks: list[Check]) -> dict[str, Any]:
    """`{"ok": ..., "checks": [...]}`. "ok" is true if no check failed. Warnings do not count."""
    return {
        "ok": all(check.status != "fail" for check in checks),
        "checks": [asdict(check) for check in checks],
    }


def show(checks: list[Check]) -> None:
    """Print the checks as a table on stdout."""
    found, fix = Column("found", overflow="fold"), Column("what to do", overflow="fold")
    table = Table("check", "", found, fix)
    for check in checks:
        status = Text(check.status, STATUSES[check.status])
        table.add_row(check.name, status, Text(check.found), Text(check.fix))
    Console().print(table)
