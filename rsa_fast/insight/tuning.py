"""Find the loading settings that train fastest on this machine and these images.

`tune(recipe, Path("data"), Path("tuned.yaml"))` writes them to a file for `train --config`.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import count, product
from pathlib import Path
from typing import Any

import torch
import yaml

from rsa_fast.insight.measure import open_loader, skip_prefetched
from rsa_fast.insight.timeline import Timeline
from rsa_fast.pipelines import BACKENDS, Loading, Source, choose_backend
from rsa_fast.pipelines.files import write_text
from rsa_fast.pipelines.layouts import Data
from rsa_fast.pipelines.loading import AggressiveOn, DecodeOn
from rsa_fast.pipelines.machine import cores
from rsa_fast.recipes import Recipe
from rsa_fast.training.step import Run, build_run, for_any_device, train_steps

log = logging.getLogger("rsa_fast")


def tune(recipe: Recipe, data: Data, out: str | Path, budget_s: float = 300.0) -> dict[str, Any]:
    """Write the loading settings with which `recipe` trains fastest to the YAML file `out`.

    `train --config` takes this file. The search is successive halving. In each round, all remaining
    settings get the same share of the time, and then the slower half is dropped. The recipe's own
    settings are never dropped.

    Returns the fastest `settings` and their `images_per_s`. `over_own` is their speed relative to
    the recipe's own settings in the same round. `tried` is how many of the `candidates` were
    measured, because a small budget may not suffice for all of them.

    Raises the errors of `open_source`, `build_run` and, for the recipe's own settings, of
    `open_views`.
    """
    out, deadline = Path(out), time.perf_counter() + budget_s
    recipe = for_any_device(recipe)
    source = recipe.open_source(data, "pretrain")
    run = build_run(recipe, len(source.manifest))
    own, _ = recipe.loading.resolved(source, run.device)
    others = candidates(own, source, run.device)
    settings = [own, *(loading for loading in others if loading != own)]
    iteration_ms(run, source, own, 0)  # warms up
    remaining = list(range(len(settings)))  # these are indices of `settings`
    last_ms: dict[int, float] = {}  # the times of the last round, by index
    tried = 0
    while not last_ms or (len(remaining) > 1 and time.perf_counter() < deadline):
        rounds = max(1, math.ceil(math.log2(len(remaining))))
        share_s = (deadline - time.perf_counter()) / rounds / len(remaining)
        round_ms: dict[int, float] = {}
        for i in remaining:
            # The first round stops when the budget is used up, but tries at least one setting.
            if not last_ms and round_ms and time.perf_counter() > deadline:
                break
            try:
                round_ms[i] = iteration_ms(run, source, settings[i], share_s)
                images_per_s = 1e3 * recipe.batch_size / round_ms[i]
                log.info(f"{images_per_s:9,.1f} images/s  {described(settings[i])}")
            except ValueError as error:
                log.info(f"    not possible  {described(settings[i])}: {error}")
        last_ms = round_ms
        tried = tried or len(round_ms)
        fastest = sorted(last_ms, key=last_ms.__getitem__)
        remaining = []
        if len(last_ms) > 2:
            remaining = [0, *(i for i in fastest[: len(last_ms) // 2] if i)]
    best = min(last_ms, key=last_ms.__getitem__)
    out.parent.mkdir(parents=True, exist_ok=True)
    names = {"dataset": recipe.dataset, "method": recipe.method}
    fields = names | asdict(settings[best])
    write_text(out, yaml.safe_dump(fields, sort_keys=False))
    return {
        "out": str(out),
        "settings": asdict(settings[best]),
        "images_per_s": 1e3 * recipe.batch_size / last_ms[best],
        "over_own": last_ms[0] / last_ms[best],
        "tried": tried,
        "candidates": len(settings),
    }


def iteration_ms(run: Run, source: Source, loading: Loading, share_s: float) -> float:
    """The milliseconds of an iteration, which consists of a step and its views.

    The time for opening the loader is part of `share_s`. The rest is used for iterations, at least
    one.
    """
    deadline = time.perf_counter() + share_s
    with open_loader(run, source, loading) as loader, skip_prefetched(loader) as batches:
        steps = train_steps(run, batches)
        next(steps)
        parts_ms, _ = Timeline(run.device).time(steps, deadline - time.perf_counter())
    return sum(parts_ms.values())


def described(loading: Loading) -> str:
    return "  ".join(f"{name} {value}" for name, value in asdict(loading).items())


def candidates(own: Loading, source: Source, device: torch.device) -> list[Loading]:
    """Variants of the settings `own` for a source on a device.

    `torchvision`, the slow reference, is left out. The backends take turns, each with its settings
    in random order, so that even a small budget sees every backend.
    """
    suitable = {
        "resident": choose_backend(source, device)[0] == "resident",
        "native": True,
        "ffcv": source.beton is not None,
        "dali": source.encoded is not None,
    }
    backends = [name for name, suits in suitable.items() if suits and BACKENDS[name].installed()]
    most = cores()
    thread_counts = sorted({2**power for power in range(most.bit_length())} | {most})
    places: tuple[AggressiveOn, ...] = ("host", "device")
    decoders: tuple[DecodeOn, ...] = ("gpu", "cpu")
    variants: list[Loading] = []
    for backend, threads, prefetch, place in product(backends, thread_counts, (2, 4), places):
        variant = replace(
            own,
            backend=backend,
            threads=threads,
            prefetch_batches=prefetch,
            aggressive_on=place,
        )
        if backend == "dali" and device.type == "cuda":
            if place == "device":
                variants += [replace(variant, decode_on=decode) for decode in decoders]
        # The resident backend does not prefetch, so one value of prefetch_batches is enough.
        elif not BACKENDS[backend].resident or prefetch == 2:
            variants.append(variant)
    random.Random(0).shuffle(variants)
    turns: defaultdict[str, Iterator[int]] = defaultdict(count)
    return sorted(variants, key=lambda loading: next(turns[loading.backend]))
