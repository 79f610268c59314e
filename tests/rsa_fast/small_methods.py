"""Methods with small networks, batches of noise for them, and what their losses are made of.

Losses by loops take one pair of embeddings after the other. Nothing here is fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from rsa_fast.distributed import world_size
from rsa_fast.methods import method_class
from rsa_fast.methods.method import BankMethod, JigsawHead, Loss, Method, build_method, unit
from rsa_fast.pipelines.views import VIEWS, Batch
from rsa_fast.recipes import build_recipe
from rsa_fast.training.step import Run, build_run
from tests.tiny_runs import NARROW

BATCH, IMAGES = 6, 20
NOW = {"beta": 0.3, "step": 3, "lambda_": 1.0, "frozen": 0.0, "queue": 0.0}
FIELDS = NARROW | {
    "batch_size": BATCH,
    "hidden_dim": 12,
    "out_dim": 5,
    "queue_size": 16,
    "bn": "local",
    "classes": 3,
    "bottleneck_dim": 4,
    "prototypes": 7,
    "negatives": 8,
}
OWN = {"w-mse": {"out_dim": 3}}  # it whitens 2 * out_dim images together


def fields_of(name: str) -> dict:
    """Return the entries of `FIELDS` that are fields of the method's recipe."""
    known = method_class(name).recipe_type.model_fields
    fields = FIELDS | OWN.get(name, {})
    return {key: value for key, value in fields.items() if key in known}


def small(name: str, **overrides) -> Method:
    torch.manual_seed(0)
    recipe = build_recipe("cifar10", name, overrides=fields_of(name) | overrides)
    method = build_method(recipe)
    method.allocate(IMAGES)
    method.double()
    # The initial gain of zero stops the gradient of its block's convolutions.
    for block in method.modules():
        if isinstance(block, BasicBlock):
            torch.nn.init.ones_(block.bn2.weight)
    return method


def some_batch(seed: int = 0, names: Sequence[str] = VIEWS) -> Batch:
    """Return a batch of random views of 8 px, and patches of 4 px."""
    generator, views = torch.Generator().manual_seed(seed), {}
    for name in names:
        shape = (BATCH, 9, 3, 4, 4) if name.startswith("patches") else (BATCH, 3, 8, 8)
        views[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
    ids = torch.randperm(IMAGES, generator=generator)[:BATCH]
    return Batch(torch.arange(BATCH) % 3, views, ids)


def batch_of(method: Method, seed: int = 0) -> Batch:
    """Return a batch of the views that the method reads, and of RSA's four."""
    return some_batch(seed, (*VIEWS, *sorted(method.reads - set(VIEWS))))


def rows(count: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return unit(torch.randn(count, dim, generator=generator, dtype=torch.float64))


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def log_softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in values)
    return [v - math.log(total) for v in values]


# ---- Methods that read crops of two sizes

STEP = 1e-8  # of finite differences; a longer one passes kinks of ReLUs
MULTI_CROP = {
    "swav": {
        "prototypes": 7,
        "views.groups": [
            {"name": "global", "count": 2},
            {"name": "local", "count": 2, "size_px": 16},
        ],
    },
    "dino": {
        "bottleneck_dim": 6,  # the scores are 5
        "views.groups": [
            {"name": "global_1", "count": 1, "blur_p": 1.0},
            {"name": "global_2", "count": 1, "blur_p": 0.1, "solarize_p": 0.2},
            {"name": "local", "count": 2, "size_px": 16},
        ],
    },
}
SIZES = (8, 8, 6, 6)  # px of the four crops in these tests


def multi_crop_run(name: str, **fields) -> Run:
    fields = NARROW | {"hidden_dim": 12, "out_dim": 5, "batch_size": BATCH, "epochs": 5} | fields
    fields |= MULTI_CROP[name] | {"precision": "fp32", "device": "cpu", "peak_lr": 0.05}
    return build_run(build_recipe("cifar10", name, overrides=fields), 4 * BATCH)


def some_crops(seed: int = 0, images: int = BATCH) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = {
        f"aggressive_{k + 1}": torch.randn(images, 3, side, side, generator=generator).double()
        for k, side in enumerate(SIZES)
    }
    return Batch(torch.zeros(images, dtype=torch.int64), views)


def float_crops(seed: int) -> Batch:
    batch = some_crops(seed)
    return Batch(batch.label, {name: view.float() for name, view in batch.views.items()})


# ---- Methods with a memory bank, and the jigsaw

BANK_IMAGES = 11
IDS = torch.tensor([7, 0, 10, 3, 2, 9])


def with_bank(name: str, images: int = BANK_IMAGES, **overrides) -> BankMethod:
    method = small(name, **{"negatives": 4, **overrides})
    method.allocate(images)
    return method.double()


def bank_batch(ids: torch.Tensor, seed: int = 0) -> Batch:
    """Return a batch with all views that a method of a bank reads."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(len(ids), *shape, generator=generator, dtype=torch.float64)

    views = {"aggressive_1": noise(3, 8, 8), "patches_2": noise(9, 3, 8, 8)}
    return Batch(torch.zeros_like(ids), views, ids)


def loss_by_loops(v: list, bank: list, ids: list, temperature: float, others: list | None) -> float:
    """Compute the batch mean, against the rows `others` of the bank, or against all."""
    total = 0.0
    for row, i in zip(v, ids, strict=True):
        drawn = [j for j in range(len(bank)) if j != i] if others is None else others
        total -= log_softmax([dot(row, bank[j]) / temperature for j in (i, *drawn)])[0]
    return total / len(v)


def bank_by_loops(bank: torch.Tensor, v: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Add the rows of the batch to those that the bank had before the step, one by one."""
    moved = bank.clone()
    for row, i in zip(v, ids.tolist(), strict=True):
        middle = [(a + b) / 2 for a, b in zip(bank[i].tolist(), row.tolist(), strict=True)]
        moved[i] = torch.tensor(middle, dtype=bank.dtype) / math.sqrt(dot(middle, middle))
    return moved


def embed_by_loops(
    encoder: torch.nn.Module, head: JigsawHead, patches: torch.Tensor, orders: np.ndarray
) -> torch.Tensor:
    """Embed the patches of each image one after the other, but for BatchNorm's common batch."""
    features = encoder(patches.reshape(-1, *patches.shape[2:]))  # (9B, F)
    embeddings = []
    for i, order in enumerate(orders.tolist()):
        places = [head.projector(features[9 * i + place]) for place in order]
        embeddings.append(head.join(torch.cat(places)))
    return unit(torch.stack(embeddings))


# ---- Losses of given embeddings


def of_embeddings(name: str, z: torch.Tensor, step: int = 0, **overrides) -> Loss:
    """The loss of a method whose networks pass their input on, for `z` `(V, B, D)`."""
    views, rows, dim = z.shape
    fields = NARROW | {"batch_size": rows * world_size(), "out_dim": dim, "hidden_dim": 4}
    crops = {"views.groups": [{"name": "crops", "count": views}]}
    recipe = build_recipe("cifar10", name, overrides=fields | crops | overrides)
    method = build_method(recipe).to(torch.promote_types(z.dtype, torch.float32))
    method.online = nn.Identity()
    if name == "w-mse":
        method.online.encoder = method.online.projector = nn.Identity()
    batch = Batch(torch.zeros(rows), {f"aggressive_{i + 1}": view for i, view in enumerate(z)})
    return method(batch, {"step": step})


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- Parameters for optimisers

SHAPES = [(8, 3, 3, 3), (8,), (5, 8), (5,)]


def parameters(
    seed: int = 0, layout: torch.memory_format = torch.contiguous_format
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [nn.Parameter(t.to(memory_format=layout) if t.ndim == 4 else t) for t in tensors]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]
