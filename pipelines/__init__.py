"""Load images and make the views that a method reads. Other packages use these names.

    from rsa_fast.pipelines import VIEWS, Loading, Order, open_source, open_views

    source = open_source("data/cifar10", "pretrain")
    order = Order(len(source.manifest), batch_size=256, seed=0)
    with open_views(source, spec, frozenset(VIEWS), order, loading=Loading(threads=8)) as loader:
        for batch in loader.batches(epoch=0): ...

All backends make the same batch from the same random parameters.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsa_fast.pipelines.backends import BACKENDS as BACKENDS
    from rsa_fast.pipelines.backends import choose_backend as choose_backend
    from rsa_fast.pipelines.layouts import open_source as open_source
    from rsa_fast.pipelines.loading import AggressiveOn as AggressiveOn
    from rsa_fast.pipelines.loading import DecodeOn as DecodeOn
    from rsa_fast.pipelines.loading import Loader as Loader
    from rsa_fast.pipelines.loading import Loading as Loading
    from rsa_fast.pipelines.loading import open_views as open_views
    from rsa_fast.pipelines.order import Order as Order
    from rsa_fast.pipelines.scan import OnBadImage as OnBadImage
    from rsa_fast.pipelines.sources import Source as Source
    from rsa_fast.pipelines.views import VIEWS as VIEWS
    from rsa_fast.pipelines.views import Batch as Batch
    from rsa_fast.pipelines.views import CropGroup as CropGroup
    from rsa_fast.pipelines.views import ViewSpec as ViewSpec

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
    """Import a name only when it is used: `rsa-fast --help` lists the backends without torch."""
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"rsa_fast.pipelines.{MODULE_OF[name]}"), name)


if __name__ == "pipelines":  # imported from the top folder of a clone
    from rsa_fast.pipelines.short_name import share

    share()
