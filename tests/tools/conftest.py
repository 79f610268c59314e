from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.mixed import mixed_folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed_folder(tmp_path_factory.mktemp("images"))
