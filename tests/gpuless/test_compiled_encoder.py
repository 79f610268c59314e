"""What Inductor makes of the encoder for a V100: BatchNorm, ReLU and residual sums in as few passes as they can take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from budget import hold, rewrite
from fake_gpu import on_fake_gpu


def test_a_compiled_encoder_moves_fewer_bytes_also_where_ranks_share_their_statistics(tmp_path):
    found = json.loads(on_fake_gpu(Path(__file__).with_name("compiled_encoder.py"), tmp_path))
    rewrite("compiled_encoder", found)
    eager, local, sync = (
        found[name]["forward_gb"] + found[name]["backward_gb"]
        for name in ("eager", "local", "sync")
    )
    assert (
        local < 0.91 * eager and found["local"]["forward_gb"] < 0.75 * found["eager"]["forward_gb"]
    )
    assert sync == pytest.approx(
        local, rel=2e-3
    )  # the statistics themselves; no pass over the images more
    for bn in ("local", "sync"):
        hold("compiled_encoder", bn, found[bn])
