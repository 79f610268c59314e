"""The weights that a run starts from: `--init-from`.

    log.info(take_weights(run.method, recipe, Path("moco_v2_800ep_pretrain.pth.tar")))

A checkpoint of the same method whose networks have the same shapes gives all of its weights. From
everything else that `load_encoder` reads, the encoder is taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rsa_fast.archs import RESNETS
from rsa_fast.evaluation.encoders import (
    beginning,
    build_resnet,
    own_weights,
    read_file,
    traits,
    weights_in,
)
from rsa_fast.methods import short_name
from rsa_fast.methods.method import Method
from rsa_fast.networks import Encoder, Projected
from rsa_fast.recipes import Recipe


def take_weights(method: Method, recipe: Recipe, path: Path) -> str:
    """Load weights of the file at `path` into `method`. Returns what was taken, in a line.

    The encoder goes into the online network and into a target network. Raises ValueError, with both
    sides, for what does not fit, and as `load_encoder` does.
    """
    content = read_file(path)
    state, saved = weights_in(content), content.get("recipe", {})
    if saved.get("method") == recipe.method and shapes(state) == shapes(method.state_dict()):
        method.load_state_dict(state)
        return f"{short_name(recipe.method)} ({path.name}): {len(state)} tensors taken, heads too"
    try:
        weights, note = fitting_encoder(method.encoder, recipe.arch, state, saved)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path} cannot start this run: {error}") from error
    projected = [module for module in method.modules() if isinstance(module, Projected)]
    for encoder in (method.encoder, *(network.encoder for network in projected)):
        encoder.load_state_dict(weights)
    return (
        f"encoder of {recipe.arch} ({path.name}): {len(weights)} tensors taken; "
        f"heads start from scratch{note}"
    )


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def fitting_encoder(
    encoder: Encoder, arch: str, state: dict[str, Tensor], saved: dict[str, Any]
) -> tuple[dict[str, Tensor], str]:
    """The weights in `state` for an encoder of this `arch`, and what else differs, for the log.

    `saved` is the recipe in the checkpoint, or empty. Raises ValueError unless they fit.
    """
    saved_arch = saved.get("arch", arch)
    if saved_arch != arch and {saved_arch, arch} - RESNETS.keys():
        raise ValueError(f"{saved_arch} in the checkpoint, {arch} now")
    if arch in RESNETS:
        saved_encoder = build_resnet(state)
        here, there = traits(encoder), traits(saved_encoder)
        if differ := [name for name in here if here[name] != there[name]]:
            sides = [f"{name} {there[name]} in the checkpoint, {here[name]} now" for name in differ]
            fix = " ".join(f"--set {name}={there[name]}" for name in differ)
            raise ValueError(f"{'; '.join(sides)} ({fix})")
        note = ""
        if beginning(saved_encoder) != beginning(encoder):
            note = (
                f"; there it begins with {beginning(saved_encoder)}, here with {beginning(encoder)}"
            )
        return saved_encoder.state_dict(), note
    weights, expected = own_weights(encoder, state), shapes(encoder.state_dict())
    for key, shape in shapes(weights).items():
        if shape != expected[key]:
            raise ValueError(f"{key} {shape} in the checkpoint, {expected[key]} now")
    return weights, ""
