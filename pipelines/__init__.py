"""From images to the views that a method reads: the names that other packages use.

    from pipelines import VIEWS, Loading, Order, open_source, open_views

    source = open_source("data/cifar10", "pretrain")
    order = Order(len(source.manifest), batch_size=256, seed=0)
    with open_views(source, spec, frozenset(VIEWS), order, loading=Loading(threads=8)) as loader:
        for batch in loader.batches(epoch=0): ...

All backends make the same batch from the same random parameters.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.backends import BACKENDS as BACKENDS
    from pipelines.backends import choose_backend as choose_backend
    from pipelines.layouts import open_source as open_source
    from pipelines.loading import AggressiveOn as AggressiveOn
    from pipelines.loading import DecodeOn as DecodeOn
    from pipelines.loading import Loader as Loader
    from pipelines.loading import Loading as Loading
    from pipelines.loading import open_views as open_views
    from pipelines.order import Order as Order
    from pipelines.scan import OnBadImage as OnBadImage
    from pipelines.sources import Source as Source
    from pipelines.views import VIEWS as VIEWS
    from pipelines.views import Batch as Batch
    from pipelines.views import CropGroup as CropGroup
    from pipelines.views import ViewSpec as ViewSpec

EXPORTS = {
    "backends": ("BACKENDS", "choose_backend"),
    "layouts": ("open_source",),
    "loading": ("AggressiveOn", "DecodeOn", "Loader", "Loading", "open_views"),
    "order": ("Order",),
    "scan": ("OnBadImage",),
    "sources": ("Source",),
    "views": ("VIEWS", "Batch", "CropGroup", "ViewSpec"),
}
MODULE_OF = {name: module for module, names in EXPORTS.items() for name in names}
__all__ = list(MODULE_OF)


def __getattr__(name: str) -> Any:
    """Import a name when it is used: `rsa-fast --help` reads the backends' names without torch."""
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"pipelines.{MODULE_OF[name]}"), name)
