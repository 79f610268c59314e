"""Inductor's kernels of the encoder take as few passes as possible on a V100.

This concerns BatchNorm, ReLU and residual sums.
"""

from __future__ import annotations

import json

import pytest

from tests.fake_gpu import on_fake_gpu
from tests.gpuless.budget import hold, rewrite


@pytest.mark.slow
def test_a_compiled_encoder_moves_fewer_bytes_also_where_ranks_share_their_statistics(tmp_path):
    found = json.loads(on_fake_gpu("-m", "tests.gpuless.compiled_encoder", tmp_path))
    rewrite("compiled_encoder", found)
    eager, local, sync = (
        found[name]["forward_gb"] + found[name]["backward_gb"]
        for name in ("eager", "local", "sync")
    )
    assert (
        local < 0.91 * eager and found["local"]["forward_gb"] < 0.75 * found["eager"]["forward_gb"]
    )
    # SyncBN adds the statistics themselves, but no pass over the images.
    assert sync == pytest.approx(local, rel=2e-3)
    for bn in ("local", "sync"):
        hold("compiled_encoder", bn, found[bn])
