"""The package's short name in a clone: `pipelines.NAME` is the module `rsa_fast.pipelines.NAME`.

An installed rsa-fast has only the long name, so that it cannot conflict with a user's own
`pipelines`. A clone has the folder at its top. If modules were imported from there, they would
exist twice, and the `Batch` of one copy would not be the `Batch` of the other.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

import rsa_fast.pipelines

SHORT = "pipelines"


class ShortName(MetaPathFinder, Loader):
    """Finds the modules below `pipelines` if this is our package and not another of that name."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        ours = name.startswith(f"{SHORT}.") and path == rsa_fast.pipelines.__path__
        return spec_from_loader(name, self) if ours else None

    def exec_module(self, module: ModuleType) -> None:
        # The import system returns what a module puts into its own place.
        sys.modules[module.__name__] = import_module(f"rsa_fast.{module.__name__}")


def share() -> None:
    """Make `pipelines` the module `rsa_fast.pipelines`."""
    sys.modules[SHORT] = rsa_fast.pipelines
    sys.meta_path.insert(0, ShortName())
