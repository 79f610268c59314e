"""Which loading settings train fastest on this machine and these images: `tune(recipe, Path("data"), Path("tuned.yaml"))`."""

from __future__ import annotations

import math
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import count, product
from pathlib import Path
from typing import Any

import torch
import yaml

from pipelines import AggressiveOn, Backend, DecodeOn, Source, choose_backend, open_source
from rsa_fast.insight.profiling import loading_of, open_loader, steady
from rsa_fast.insight.timeline import Timeline
from rsa_fast.recipes import Loading, Recipe
from rsa_fast.training.step import Run, build_run, train_step


def tune(recipe: Recipe, data: Path, out: Path, budget_s: float = 300.0) -> dict[str, Any]:
    """Write the loading settings with which `recipe` trains fastest to the YAML `out`, which `--config` takes.

    Successive halving: each round gives all settings that are left the same share of the time, then the slower half goes; the
    recipe's own stay in to the end. Returns the fastest `settings`, their `images_per_s`, `over_own`, how many times those
    of the recipe's own in the same round, and how many of `candidates` were tried: a small budget is not enough for all.

    Raises as `open_source`, `build_run` and, for the recipe's own settings, `open_views` do.
    """
    ends = time.perf_counter() + budget_s
    source = open_source(data, "pretrain")
    run = build_run(recipe, len(source.manifest))
    own = loading_of(recipe, source, run.device)
    settings = [
        own,
        *(own | other for other in candidates(source, run.device) if own != own | other),
    ]
    iteration_ms(run, source, own, 0)  # warms up
    left = list(range(len(settings)))
    ms: dict[int, float] = {}  # of the last round, by the place in `settings`
    tried = 0
    while not ms or (len(left) > 1 and time.perf_counter() < ends):
        share_s = (ends - time.perf_counter()) / max(1, math.ceil(math.log2(len(left)))) / len(left)
        round_ms: dict[int, float] = {}
        for place in left:
            if not ms and round_ms and time.perf_counter() > ends:
                break
            try:
                round_ms[place] = iteration_ms(run, source, settings[place], share_s)
                print(
                    f"{1e3 * recipe.batch_size / round_ms[place]:9,.1f} images/s  {settings[place]}",
                    file=sys.stderr,
                )
            except ValueError as error:
                print(f"    not possible  {settings[place]}: {error}", file=sys.stderr)
        ms, tried = round_ms, tried or len(round_ms)
        fastest = sorted(ms, key=ms.__getitem__)
        left = [0, *(place for place in fastest[: len(ms) // 2] if place)] if len(ms) > 2 else []
    best = min(ms, key=ms.__getitem__)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        yaml.safe_dump(
            {"dataset": recipe.dataset, "method": recipe.method, **settings[best]}, sort_keys=False
        )
    )
    result = {
        "out": str(out),
        "settings": settings[best],
        "images_per_s": 1e3 * recipe.batch_size / ms[best],
    }
    return result | {"over_own": ms[0] / ms[best], "tried": tried, "candidates": len(settings)}


def iteration_ms(run: Run, source: Source, settings: Loading, share_s: float) -> float:
    """Of step and views, measured in what opening the loader leaves of `share_s`, once at least."""
    ends = time.perf_counter() + share_s
    with open_loader(run, source, settings) as loader, steady(loader) as batches:
        train_step(run, next(batches))
        steps = (train_step(run, batch) for batch in batches)
        return sum(Timeline(run.device).time(steps, ends - time.perf_counter())[0].values())


def candidates(source: Source, device: torch.device) -> list[Loading]:
    """What there is to choose for a source on a device, without `torchvision`, the reference.

    The backends take turns, each with its settings in random order, so that even a small budget
    sees every backend.
    """
    backends: list[Backend] = ["native"]
    if choose_backend(source, device)[0] == "resident":
        backends.insert(0, "resident")
    if source.beton and find_spec("ffcv"):
        backends.append("ffcv")
    if source.encoded and find_spec("nvidia") and find_spec("nvidia.dali"):
        backends.append("dali")
    cores = len(os.sched_getaffinity(0))
    thread_counts = sorted({2**power for power in range(cores.bit_length())} | {cores})
    places: tuple[AggressiveOn, ...] = ("host", "device")
    decoders: tuple[DecodeOn, ...] = ("gpu", "cpu")
    found: list[Loading] = []
    for backend, threads, prefetch, place in product(backends, thread_counts, (2, 4), places):
        setting: Loading = {
            "backend": backend,
            "threads": threads,
            "prefetch_batches": prefetch,
            "aggressive_on": place,
        }
        if backend == "dali" and device.type == "cuda":
            if place == "device":
                found += [setting | {"decode_on": decode} for decode in decoders]
        elif backend != "resident" or prefetch == 2:  # which makes none ahead
            found.append(setting)
    random.Random(0).shuffle(found)
    turns: defaultdict[str, Iterator[int]] = defaultdict(count)
    return sorted(found, key=lambda setting: next(turns[setting["backend"]]))
