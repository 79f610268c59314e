"""From a folder of photographs to an accuracy, embeddings and the weights of an encoder.

    python examples/own_images.py my_photos runs/my_photos

`my_photos` contains one folder of images per class. A fifth of the images is held out for the
scores. Without class folders there are no scores, so leave out the two `evaluate` lines.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from rsa_fast import build_recipe, embed, evaluate, train
from rsa_fast.evaluation.export import export


def main(data: Path, out: Path, **changes: Any) -> dict[str, float]:
    """Returns the accuracies of two classifiers, in percent. `changes` are fields of the recipe."""
    # The recipe `auto` chooses the size, the network and the length of the run from the images.
    recipe = build_recipe("auto", "rsa", data=data, **changes)
    print(recipe)

    # If the run was stopped, the same call continues it exactly.
    train(recipe, data, out, resume=True)

    # A run's folder means its newest checkpoint and its images.
    knn = evaluate(out, protocol="knn")
    linear = evaluate(out, protocol="linear")

    # `embed` writes a row of features for each image. `export` writes the weights, and a model card
    # that describes how to load them.
    embed(out, data, out / "embeddings.npz")
    export(out, "safetensors", out / "encoder" / "encoder.safetensors", overwrite=True)
    return {"knn_top1": knn["knn_top1"], "linear_top1": linear["linear_top1"]}


if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(message)s")
    print(main(Path(sys.argv[1]), Path(sys.argv[2])))
