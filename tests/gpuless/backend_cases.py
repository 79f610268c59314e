"""The cases of backends.py, which runs on a fake GPU, and of its test, which has no GPU."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

CASES = {
    "native, device": {"backend": "native", "aggressive_on": "device"},
    "native, host": {"backend": "native", "aggressive_on": "host"},
    "resident, device": {"backend": "resident", "aggressive_on": "device"},
    "resident, host": {"backend": "resident", "aggressive_on": "host"},
}
# Vertical flips, quarter turns, and an augmentation of one's own with a generator on the device.
TURNED = {"views.vertical_flip_p": 0.5, "views.quarter_turns": True}
TURNED |= {"views.extra": f"{Path(__file__).with_name('own_views.py')}:noise"}
CASES["native, turned"] = CASES["native, device"] | TURNED
CASES["resident, turned"] = CASES["resident, device"] | TURNED
if find_spec("ffcv"):
    CASES["ffcv, device"] = {"backend": "ffcv", "aggressive_on": "device"}
    CASES["ffcv, host"] = {"backend": "ffcv", "aggressive_on": "host"}
if find_spec("nvidia.dali"):
    CASES["dali, decode on gpu"] = {"backend": "dali", "decode_on": "gpu"}
    CASES["dali, decode on cpu"] = {"backend": "dali", "decode_on": "cpu"}
    CASES["dali, turned"] = CASES["dali, decode on gpu"] | TURNED
