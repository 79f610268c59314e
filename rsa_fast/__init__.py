"""Fast self-supervised pre-training with RSA and other methods, from Python:

>>> from pathlib import Path
>>> from rsa_fast.pipelines import VIEWS, Order, open_source, open_views
>>> from rsa_fast import Callback, EarlyStopping, build_recipe, evaluate, load_encoder, train
>>> data, out = "data/cifar10", Path("runs/notebook")
>>> recipe = build_recipe("cifar10", "rsa", epochs=2, batch_size=32, width=8, views={"blur_p": 0})
>>> recipe  # the last line shows the differences from the published numbers
rsa on cifar10: resnet18, 32 px, batch 32, 2 epochs, lr 0.0125
  width 8 (not 64), epochs 2 (not 200), batch_size 32 (not 256), views.blur_p 0.0 (not 0.5)
>>> source = open_source(data, "pretrain")
>>> order = Order(len(source.manifest), batch_size=32, seed=0)
>>> with open_views(source, recipe.views, frozenset(VIEWS), order) as loader:
...     batch = next(loader.batches(epoch=0))  # weak_1, weak_2, aggressive_1, aggressive_2, label
>>> batch.aggressive_1.shape
torch.Size([32, 3, 32, 32])
>>> class Diary(Callback):  # see `Callback` for what else a program can do during training
...     def on_epoch(self, run, epoch, scores):
...         self.epochs = epoch
>>> stop = EarlyStopping("knn_top1", patience_epochs=20)
>>> result = train(recipe, data, out, callbacks=[stop, Diary()])  # as in result.json: knn_top1, ...
>>> checkpoint = max(out.glob("checkpoints/*.pt"))
>>> scores = evaluate(checkpoint, data, "linear")  # linear_top1, ... in percent
>>> encoder, recipe = load_encoder(checkpoint)
>>> encoder.eval()(batch.weak_1).shape  # features
torch.Size([32, 64])

The public interface consists of the names in `rsa_fast.__all__` and `rsa_fast.pipelines.__all__`
and of the commands of `rsa-fast`. Your own methods may also use `rsa_fast.methods.method`,
`rsa_fast.recipes.Recipe`, `rsa_fast.sourced`, `rsa_fast.networks.Encoder` and
`rsa_fast.distributed.gather`. CHANGELOG.md lists every change of these. All other modules and names
can change in any version.
"""

import getpass
import os
from importlib import import_module
from importlib.metadata import version
from typing import Any

# torch names a folder of its compiler after the user. A container may run under a user id without a
# name (docker run --user, OpenShift). Python then raises a KeyError.
try:
    getpass.getuser()
except KeyError:
    os.environ["USER"] = str(os.getuid())

EXPORTS = {
    "Callback": "training.callbacks",
    "EarlyStopping": "training.callbacks",
    "build_recipe": "recipes",
    "embed": "evaluation.embed",
    "evaluate": "evaluation.evaluate",
    "finetune": "evaluation.finetune",
    "load_encoder": "evaluation.encoders",
    "neighbours": "insight.neighbours",
    "predict": "evaluation.predict",
    "train": "training.engine",
}
__all__ = list(EXPORTS)


def __getattr__(name: str) -> Any:
    """Import a name when it is used, so that `rsa-fast --help` does not import torch."""
    if name == "__version__":
        return version("rsa-fast")
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"rsa_fast.{EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
