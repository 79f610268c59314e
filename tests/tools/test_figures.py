from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from rsa_fast.tools import figures


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("figures")
    figures.main(["--out", str(out)], standalone_mode=False)
    return out


@pytest.mark.parametrize("name", figures.DRAWERS)
def test_a_picture_is_drawn_from_what_is_recorded_and_is_small(drawn, name):
    there, again = figures.FIGURES / name, drawn / name
    assert there.stat().st_size < 300_000
    if name.endswith(".svg"):
        assert there.read_text() == again.read_text()
    else:
        images = (np.asarray(Image.open(path).convert("RGB")) for path in (there, again))
        np.testing.assert_array_equal(*images)


def test_a_picture_s_background_is_opaque(drawn):
    assert Image.open(drawn / "views.png").convert("RGBA").getextrema()[3] == (255, 255)
    for name in ("flow.svg", "throughput.svg", "resume.svg"):
        page = ElementTree.parse(drawn / name).getroot().find("{http://www.w3.org/2000/svg}rect")
        assert page.get("fill") == "#ffffff" and "fill-opacity" not in page.attrib


def test_the_run_that_was_killed_has_the_losses_of_the_one_left_alone():
    recorded = json.loads(figures.KILLED_RUNS.read_text())
    assert recorded["loss_alone"] == recorded["loss_killed"]
    kills = recorded["killed_at_step"]
    assert len(kills) == 20 and min(kills) >= 0 and max(kills) < len(recorded["loss_alone"])
