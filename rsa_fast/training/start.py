"""The weights that a run starts from: `--init-from`.

    print(take_weights(run.method, recipe, Path("moco_v2_800ep_pretrain.pth.tar")))

If the file is a checkpoint of the same method whose networks have the same shapes, all of its
weights are loaded. From any other file that `load_encoder` reads, only the encoder is loaded, and
the log lists the tensors that are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rsa_fast.archs import RESNETS
from rsa_fast.evaluation.encoders import (
    Choice,
    beginning,
    build_resnet,
    find_weights,
    is_own,
    leaves_in,
    log_left_out,
    read_file,
    traits,
)
from rsa_fast.methods import short_name
from rsa_fast.methods.method import Method
from rsa_fast.networks import Encoder, Projected
from rsa_fast.recipes import Recipe
from rsa_fast.training.checkpoint import check_finite, newest_checkpoint


def take_weights(method: Method, recipe: Recipe, path: Path, key: str | None = None) -> str:
    """Load weights of the file at `path` into `method`. Returns a line for the log.

    The encoder is copied to the online network and to a target network. `key` chooses it among
    several networks in the file. Raises ValueError, which shows both sides, if the weights do not
    fit, and the errors of `load_encoder`.
    """
    path = newest_checkpoint(path)
    content = read_file(path)
    saved = content["recipe"] if is_own(content) else {}
    why = ""
    try:
        if saved.get("method") == recipe.method and not key:
            state = content["method"]
            check_finite(state)
            if not (why := first_difference(state, method.state_dict())):
                method.load_state_dict(state)
                name = short_name(recipe.method)
                return f"{name} ({path.name}): {len(state)} tensors loaded, including the heads"
            why = f": {why}"
        elif saved and not key:
            theirs = short_name(str(saved.get("method")))
            why = f": method {theirs} in the checkpoint, {short_name(recipe.method)} now"
        choice, note = fitting_encoder(method.encoder, recipe.arch, leaves_in(content), saved, key)
    except ValueError as error:
        raise ValueError(f"{path} cannot start this run: {error}") from error
    if not saved or key:
        log_left_out(path, choice)
    projected = [module for module in method.modules() if isinstance(module, Projected)]
    for encoder in (method.encoder, *(network.encoder for network in projected)):
        encoder.load_state_dict(choice.weights)
    return (
        f"encoder of {recipe.arch} ({path.name}): {len(choice.weights)} tensors loaded; heads "
        f"start from scratch{why}{note}"
    )


def shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}


def first_difference(saved: dict[str, Any], now: dict[str, Any]) -> str:
    """The first weight whose shape differs between a checkpoint and now, or "" if none does."""
    there, here = shapes(saved), shapes(now)
    for key in here | there:
        if here.get(key) != there.get(key):
            sides = [shape or "missing" for shape in (there.get(key), here.get(key))]
            return f"{key} {sides[0]} in the checkpoint, {sides[1]} now"
    return ""


def fitting_encoder(
    encoder: Encoder, arch: str, leaves: dict[str, Any], saved: dict[str, Any], key: str | None
) -> tuple[Choice, str]:
    """The weights among `leaves` for an encoder of this `arch`, and a note on other differences.

    `saved` is the recipe in the checkpoint, or empty. Raises ValueError if they do not fit.
    """
    saved_arch = saved.get("arch", arch)
    if saved_arch != arch and {saved_arch, arch} - RESNETS.keys():
        raise ValueError(f"{saved_arch} in the checkpoint, {arch} now")
    if arch in RESNETS:
        saved_encoder, choice = build_resnet(leaves, key)
        here, there = traits(encoder), traits(saved_encoder)
        if differ := [name for name in here if here[name] != there[name]]:
            sides = [f"{name} {there[name]} in the checkpoint, {here[name]} now" for name in differ]
            fix = " ".join(f"--set {name}={there[name]}" for name in differ)
            raise ValueError(f"{'; '.join(sides)} ({fix})")
        note = ""
        if beginning(saved_encoder) != beginning(encoder):
            note = (
                f"; its network begins with {beginning(saved_encoder)}, this one with "
                f"{beginning(encoder)}"
            )
        return choice, note
    choice = find_weights(encoder, leaves, key)
    if difference := first_difference(choice.weights, encoder.state_dict()):
        raise ValueError(difference)
    return choice, ""
