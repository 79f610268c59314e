"""The doctor: its checks with injected facts, its readers on made-up machines, and its command.

The command examines the machine of the test.
"""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rsa_fast.insight.doctor as doctor
from rsa_fast.cli import main
from rsa_fast.insight.doctor import Check, arch_status, summary
from tests.helpers import ROOT, invoke

V100, A10, H100 = ("Tesla V100-SXM2-32GB", (7, 0)), ("NVIDIA A10", (8, 6)), ("NVIDIA H100", (9, 0))
TORCH_2_11 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
TORCH_2_10 = ["sm_70", *TORCH_2_11]
DALI_12, DALI_11 = {"nvidia-dali-cuda120": "2.4.0"}, {"nvidia-dali-cuda110": "1.50.0"}
APT = ["g++", "libturbojpeg0-dev"]


@pytest.mark.parametrize(
    ("arch", "runs_on", "compiled_on", "never_on"),
    [
        ("sm_70", "7.0 7.2 7.5", "", "6.1 8.0 9.0"),
        ("sm_80", "8.0 8.6 8.9", "", "7.5 9.0"),
        ("sm_86", "8.6 8.9", "", "8.0 9.0"),
        ("sm_120", "12.0 12.1", "", "1.2 9.0 10.0"),
        ("compute_70", "", "7.0 7.5 8.6 12.0", "6.1 5.0"),
        ("compute_86", "", "8.6 9.0 10.0", "8.0 7.5"),
        ("sm_90a", "9.0", "", "8.9 9.1 10.0"),
        ("compute_90a", "", "9.0", "10.0 12.0"),
        ("sm_100f", "10.0 10.3", "", "12.0 9.0"),
        ("compute_100f", "", "10.0 10.3", "12.0 9.0"),
    ],
)
def test_code_reaches_the_gpus_that_the_cuda_guide_says(arch, runs_on, compiled_on, never_on):
    for status, capabilities in (("ok", runs_on), ("warning", compiled_on), ("fail", never_on)):
        for capability in capabilities.split():
            assert arch_status([arch], tuple(map(int, capability.split(".")))) == status, capability


def test_the_best_code_counts_for_one_gpu_and_the_worst_gpu_for_the_machine():
    assert arch_status(["compute_70", "sm_80", "sm_90"], (8, 6)) == "ok"
    check = doctor.check_architectures(["sm_80", "sm_90"], [H100, H100, V100])
    assert check.status == "fail" and "2 x NVIDIA H100 (sm_90), 1 x Tesla V100" in check.found
    assert "nothing for sm_70" in check.found


@pytest.mark.parametrize(
    ("check", "facts", "status", "says"),
    [
        ("python", ("3.11.7", ">=3.11,<3.12"), "ok", ""),
        ("python", ("3.12.0", ">=3.11,<3.12"), "fail", "make PYTHON="),
        ("architectures", (TORCH_2_10, [V100] * 8), "ok", ""),
        (
            "architectures",
            (TORCH_2_11, [V100] * 8),
            "fail",
            "torch==2.10.0+cu128 torchvision==0.25.0+cu128",
        ),
        (
            "architectures",
            (TORCH_2_11, [V100, A10]),
            "fail",
            "https://download.pytorch.org/whl/cu128",
        ),
        ("architectures", (TORCH_2_11, [A10]), "ok", ""),
        ("architectures", (["sm_80", "compute_80"], [H100]), "warning", "torch==2.10.0+cu128"),
        ("architectures", (TORCH_2_10, [("GTX 1080", (6, 1))]), "fail", "torch==2.10.0+cu126"),
        ("architectures", (TORCH_2_10, [("of tomorrow", (13, 0))]), "fail", "--upgrade torch"),
        ("architectures", ([], [V100]), "fail", "torch==2.10.0+cu128"),
        ("architectures", (TORCH_2_11, []), "ok", ""),
        ("driver", ("12.8", "12.8", 8, 8), "ok", ""),
        ("driver", ("13.0", "12.8", 8, 8), "ok", ""),
        ("driver", ("12.4", "12.8", 8, 8), "warning", "CUDA 12.8 or later"),
        ("driver", ("12.10", "12.8", 1, 1), "ok", ""),
        ("driver", ("11.8", "12.8", 8, 8), "fail", "branch 580"),
        ("driver", (None, "12.8", 0, 2), "fail", "--gpus all"),
        ("driver", ("12.8", "12.8", 0, 2), "warning", "CUDA_VISIBLE_DEVICES"),
        ("driver", (None, "12.8", 0, 0), "ok", ""),
        ("driver", ("12.8", None, 1, 1), "ok", ""),
        ("dali", (DALI_12, "12.8", 1), "ok", ""),
        ("dali", (DALI_11, "12.8", 1), "fail", "uninstall -y nvidia-dali-cuda110 && "),
        ("dali", (DALI_11, "12.8", 0), "fail", "install nvidia-dali-cuda120"),
        ("dali", (DALI_12, "13.0", 1), "fail", "install nvidia-dali-cuda130"),
        (
            "dali",
            (DALI_11 | DALI_12, "12.8", 1),
            "fail",
            "uninstall -y nvidia-dali-cuda110 nvidia-dali-cuda120",
        ),
        ("dali", ({}, "12.8", 1), "warning", "install nvidia-dali-cuda120"),
        ("dali", ({}, "12.8", 0), "ok", ""),
        ("dali", (DALI_12, None, 0), "ok", ""),
        ("nccl", ("2.27.5", "2.27.5", 8), "ok", ""),
        ("nccl", ("2.18.1", "2.27.5", 8), "warning", "LD_LIBRARY_PATH"),
        ("nccl", (None, None, 8), "fail", "torch==2.10.0"),
        ("nccl", (None, None, 1), "ok", ""),
        ("nccl", ("2.27.5", None, 8), "ok", ""),
        ("ffcv", ("1.0.2", "", APT), "ok", ""),
        ("ffcv", (None, "", APT), "warning", "apt-get install -y g++ libturbojpeg0-dev && "),
        ("ffcv", (None, "", []), "warning", "pip install ffcv"),
        (
            "ffcv",
            ("1.0.2", "ImportError: libopencv_core.so", ["libopencv-dev"]),
            "fail",
            "apt-get install -y libopencv-dev && ",
        ),
        ("numba_cache", ("/home/me/__pycache__", ""), "ok", ""),
        (
            "numba_cache",
            ("", "RuntimeError: no locator available"),
            "fail",
            "export NUMBA_CACHE_DIR=",
        ),
        ("numba_cache", ("", ""), "warning", "export NUMBA_CACHE_DIR="),
        ("user", (1000, "me", "/home/me", True), "ok", ""),
        ("user", (1000, "", "/home/me", True), "ok", ""),
        ("user", (1000, "", "/", False), "warning", "export HOME="),
        ("cpu", ("AVX512", True, 0), "ok", ""),
        ("cpu", ("AVX2", False, 0), "warning", "avx512_bf16"),
        ("cpu", ("AVX2", False, 8), "ok", ""),
        ("cpu", ("DEFAULT", False, 8), "warning", "ATEN_CPU_CAPABILITY"),
        ("threads", (8, 8, 8, math.inf), "ok", ""),
        ("threads", (64, 64, 4, math.inf), "warning", "OMP_NUM_THREADS=4"),
        ("threads", (64, 64, 64, 2.5), "warning", "OMP_NUM_THREADS=2"),
        ("threads", (1, 64, 64, 0.5), "ok", ""),
        ("shared_memory", (16.0, 8), "ok", ""),
        ("shared_memory", (2.0, 8), "warning", "--shm-size=10g"),
        ("shared_memory", (0.06, 8), "fail", "--shm-size=10g"),
        ("shared_memory", (0.06, 1), "warning", "--shm-size=2g"),
        ("open_files", (1024, 4096, 32), "ok", ""),
        ("open_files", (math.inf, math.inf, 512), "ok", ""),
        ("open_files", (1024, 4096, 128), "warning", "ulimit -n 1294"),
        ("open_files", (256, 512, 2), "warning", "limits.conf"),
        ("out_disk", (100.0, True), "ok", ""),
        ("out_disk", (0.8, True), "warning", "--out"),
        ("out_disk", (0.3, True), "fail", "--out"),
        ("out_disk", (100.0, False), "fail", "--out"),
        ("data_disk", (300.0, 0.0), "ok", ""),
        ("data_disk", (3.0, 144.0), "ok", ""),
        ("data_disk", (200.0, 0.0), "warning", "ImageNet-1K"),
        ("page_cache", (144.0, 244.0), "ok", ""),
        ("page_cache", (144.0, 160.0), "warning", "convert ffcv"),
        ("page_cache", (0.0, 160.0), "warning", "convert ffcv"),
        ("page_cache", (144.0, 160.0), "warning", "limited in reads per second"),
        ("page_cache", (144.0, 160.0), "warning", "order=blocks"),
        ("page_cache", (144.0, 160.0), "warning", "rsa-fast stage"),
        ("page_cache", (1.0, 2.0), "ok", ""),
        ("extras", (dict.fromkeys(doctor.EXTRAS, "1.0"),), "ok", ""),
        (
            "extras",
            ({"onnx": "1.23.2", "wandb": "0.20"},),
            "ok",
            "pip install tensorboard pycocotools",
        ),
    ],
)
def test_a_check_tells_ok_warning_and_fail_apart_and_names_the_fix(check, facts, status, says):
    found = getattr(doctor, f"check_{check}")(*facts)
    assert found.status == status and found.found
    assert says in found.fix and bool(says) == bool(found.fix)


def test_the_torch_that_is_advised_is_the_pinned_one_and_has_what_is_said():
    import torch

    pins = (ROOT / "constraints.txt").read_text().splitlines()
    wanted = doctor.TORCH_PIN.format("cu128").split()
    assert [
        f"{pin}+cu128" in wanted for pin in pins if pin.startswith(("torch==", "torchvision=="))
    ] == [True, True]
    if f"torch=={torch.__version__}" not in wanted:
        pytest.skip(
            f"torch {torch.__version__} is not the pinned build, whose architectures are meant"
        )
    assert torch._C._cuda_getArchFlags().split() == list(doctor.PIN_ARCHS)


def test_the_shared_memory_wanted_is_that_of_the_batches_in_flight():
    import torch

    view = torch.empty(256, 3, 224, 224, dtype=torch.float16)
    gib = 2 * 2 * 4 * view.nbytes / 2**30  # two workers, two batches each, four views
    assert doctor.check_shared_memory(1.001 * gib, 1).status == "ok"
    assert doctor.check_shared_memory(0.999 * gib, 1).status == "warning"


def test_a_checkpoint_is_as_large_as_stated():
    import torch

    from rsa_fast.methods.method import build_method
    from rsa_fast.recipes import build_recipe

    with torch.device("meta"):
        method = build_method(build_recipe("imagenet1k", "rsa"))
    momentum = sum(p.nbytes for p in method.parameters() if p.requires_grad)
    stated = doctor.CHECKPOINT_GIB * 2**30
    assert (
        abs(sum(t.nbytes for t in method.state_dict().values()) + momentum - stated) < 0.05 * stated
    )


DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *out) { *out = VERSION; return 0; }
int cuDeviceGetCount(int *out) { *out = 2; return 0; }
int cuDeviceGet(int *out, int ordinal) { *out = 10 + ordinal; return 0; }
int cuDeviceGetName(char *name, int length, int device) {
    name[0] = 'G'; name[1] = device == 10 ? 'a' : 'b';
    return 0;
}
int cuDeviceGetAttribute(int *out, int attribute, int device) {
    *out = attribute == 75 ? (device == 10 ? 7 : 12) : attribute == 76 ? device - 10 : -1;
    return 0;
}
"""


@pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc to compile a driver library with")
@pytest.mark.parametrize(
    ("number", "version"), [(12080, "12.8"), (11040, "11.4"), (13000, "13.0"), (0, None)]
)
def test_the_driver_is_asked_for_its_cuda_and_its_gpus(tmp_path, number, version):
    library = tmp_path / f"libcuda{number}.so"
    compiler = ["gcc", "-shared", "-fPIC", "-xc", "-", f"-DVERSION={number}", "-o", str(library)]
    subprocess.run(compiler, input=DRIVER, text=True, check=True)
    assert doctor.read_driver(str(library)) == (version, [("Ga", (7, 0)), ("Gb", (12, 1))])
    assert doctor.read_driver("libno-such-driver.so") == (None, [])


def test_nvidia_display_controllers_are_counted_and_nothing_else(tmp_path):
    devices = {"v100": ("0x10de", "0x030200"), "vga": ("0x10de", "0x030000")}
    devices |= {
        "its_audio": ("0x10de", "0x040300"),
        "nvswitch": ("0x10de", "0x068000"),
        "amd": ("0x1002", "0x030000"),
    }
    for name, (vendor, kind) in devices.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    assert doctor.read_cards(tmp_path) == 2
    assert doctor.read_cards(tmp_path / "no-bus") == 0


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        ("0::/", {"cpu.max": "250000 100000\n", "memory.max": "1024\n"}, (2.5, 1024)),
        ("0::/", {"cpu.max": "max 100000\n", "memory.max": "max\n"}, (math.inf, math.inf)),
        (
            "0::/job/step",
            {"job/cpu.max": "400000 100000", "job/step/cpu.max": "max 100000"},
            (4, math.inf),
        ),
        (
            "0::/job/step",
            {"job/memory.max": "4096", "job/step/memory.max": "8192"},
            (math.inf, 4096),
        ),
        (
            "4:cpu:/\n3:memory:/",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            (math.inf, math.inf),
        ),
        (
            "4:cpu:/",
            {"cpu/cpu.cfs_quota_us": "0", "cpu/cpu.cfs_period_us": "100000"},
            (math.inf, math.inf),
        ),
        (
            "4:cpu:/host/x",
            {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"},
            (0.5, math.inf),
        ),
        ("3:memory:/a", {"memory/a/memory.limit_in_bytes": "2048"}, (math.inf, 2048)),
        ("1:name=systemd:/\n0::/", {}, (math.inf, math.inf)),
    ],
)
def test_the_tightest_limit_of_a_cgroup_and_its_parents_counts(tmp_path, groups, files, limits):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert doctor.read_cgroups(groups, tmp_path) == limits


def test_a_torch_that_does_not_import_is_the_finding(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    python, torch = doctor.diagnose(Path("data"), Path("runs"))
    assert python.status == "ok" and (torch.status, torch.fix) == ("fail", "make setup")
    assert "torch" in torch.found


def table_rows(output: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in output.splitlines()
        if line.startswith("│")
    ]


@pytest.mark.parametrize(
    ("statuses", "code"), [(("ok", "ok"), 0), (("ok", "warning"), 0), (("warning", "fail"), 1)]
)
def test_only_a_failed_check_fails_the_command(monkeypatch, statuses, code):
    checks = [
        Check(f"n{i}", status, "found [red]this[/red]", f"do {i}")
        for i, status in enumerate(statuses)
    ]
    monkeypatch.setattr(doctor, "diagnose", lambda data, out: checks)
    result = invoke(main, "doctor", env={"COLUMNS": "200"})
    assert result.exit_code == code
    *_, last = result.stdout.splitlines()
    assert json.loads(last) == summary(checks) and json.loads(last)["ok"] == (code == 0)
    assert table_rows(result.stdout) == [
        [f"n{i}", s, "found [red]this[/red]", f"do {i}"] for i, s in enumerate(statuses)
    ]


def test_this_machine_is_examined_and_the_table_says_what_the_object_says(folder, tmp_path):
    options = ["doctor", "--data", str(folder), "--out", str(tmp_path / "not" / "yet")]
    result = invoke(main, *options, env={"COLUMNS": "1000"})
    *_, last = result.stdout.splitlines()
    found = json.loads(last)
    assert table_rows(result.stdout) == [list(check.values()) for check in found["checks"]]
    assert (
        result.exit_code
        == int(not found["ok"])
        == any(check["status"] == "fail" for check in found["checks"])
    )
    by_name = {check["name"]: check for check in found["checks"]}
    assert by_name["Python"]["status"] == by_name["numba cache"]["status"] == "ok"
    assert not (tmp_path / "not").exists()


def test_every_check_that_there_is_looks_at_this_machine(tmp_path, monkeypatch):
    """A check that `diagnose` does not call would never warn anybody."""
    called = set()

    def observed(name, check):
        return lambda *facts, **named: called.add(name) or check(*facts, **named)

    checks = {name for name in vars(doctor) if name.startswith("check_")}
    for name in checks:
        monkeypatch.setattr(doctor, name, observed(name, getattr(doctor, name)))
    found = doctor.diagnose(tmp_path, tmp_path)
    assert called == checks
    assert len({check.name for check in found}) == len(found)


def test_json_prints_the_object_alone(monkeypatch):
    monkeypatch.setattr(doctor, "diagnose", lambda data, out: [Check("n", "ok", "f")])
    result = invoke(main, "doctor", "--json")
    assert json.loads(result.stdout) == {
        "ok": True,
        "checks": [{"name": "n", "status": "ok", "found": "f", "fix": ""}],
    }


def test_the_files_below_the_data_folder_are_weighed_against_the_memory(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    data.mkdir()
    elsewhere.mkdir()
    (data / "train").symlink_to(elsewhere)
    with (elsewhere / "images.beton").open("wb") as file:
        file.truncate(2**43)  # The file is sparse: no disk is as large.
    checks = {check.name: check for check in doctor.diagnose(data, tmp_path)}
    assert checks["page cache"].status == "warning" and "8192.0 GiB" in checks["page cache"].found
    assert checks["disk of --data"].status == "ok"
