"""In a clone, `pipelines` and `rsa_fast.pipelines` are one package and not two copies."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers import ROOT

SHORT = "import pipelines.order, pipelines.packed; from pipelines.views import Batch"
LONG = "import rsa_fast.pipelines.order; from rsa_fast.pipelines.views import Batch as Same"
CHECK = """
import sys
import rsa_fast.pipelines as package
assert Batch is Same and pipelines is package and pipelines.packed is package.packed
assert package.order.__spec__.name == "rsa_fast.pipelines.order"
assert sys.modules["pipelines.order"] is sys.modules["rsa_fast.pipelines.order"]
"""


@pytest.mark.parametrize("lines", [(SHORT, LONG), (LONG, SHORT)])
def test_both_names_are_the_same_modules(lines):
    program = "\n".join([*lines, CHECK])
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)
