"""One rank of a test job.

`python ranks.py WORK RANK WORLD_SIZE FOLDER` calls the function `WORK` of this file, which leaves
its result in FOLDER. `run_ranks` starts all ranks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from rsa_fast.distributed import rank, world_size


def run_ranks(work: str, ranks: int, folder: Path) -> list:
    """Return the results of `work` on all ranks."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, work]
    processes = []
    for me in range(ranks):
        arguments = [*command, str(me), str(ranks), str(folder)]
        process = subprocess.Popen(arguments, env=env, stderr=subprocess.PIPE, text=True)
        processes.append(process)
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(errors)
    return [torch.load(folder / f"{work}_{me}.pt", weights_only=False) for me in range(ranks)]


def mine(x: torch.Tensor) -> torch.Tensor:
    return x.chunk(world_size())[rank()]


def steps_of_every_method() -> dict[tuple, tuple]:
    """Take two of the engine's steps on this rank's part of the batch, in double precision.

    Return, by method and `bn`, the losses, and all weights, statistics and queues after the steps.
    """
    from test_other_methods import BATCH, batch_of, tiny_fields

    from rsa_fast.methods import METHODS, method_class
    from rsa_fast.pipelines.views import Batch
    from rsa_fast.recipes import build_recipe
    from rsa_fast.training.step import build_run, train_step

    results = {}
    cases = [(name, "sync") for name in METHODS]
    cases += [(name, "split:2") for name in ("moco", "ressl", "jcl", "infomin")]
    torch.set_default_dtype(torch.float64)
    try:
        for name, bn in cases:
            # The initial gain of zero would stop the gradient of its block's convolutions.
            options = tiny_fields(name) | {
                "bn": bn,
                "zero_init_residual": False,
                "precision": "fp32",
                "device": "cpu",
                "peak_lr": 0.01,
            }
            fields = {
                key: value
                for key, value in options.items()
                if key in method_class(name).recipe_type.model_fields
            }
            run, losses = build_run(build_recipe("cifar10", name, overrides=fields), 10 * BATCH), []
            for step in range(2):  # Each step amplifies rounding tenfold.
                whole = batch_of(run.method, step)
                views = {key: mine(view) for key, view in whole.views.items()}
                batch = Batch(mine(whole.label), views, mine(whole.ids))
                losses.append(train_step(run, batch).total.detach())
            results[name, bn] = mean(torch.stack(losses)), run.method.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    return results


def runs_with_callbacks() -> dict[str, dict]:
    """Train twice. A callback of rank 1 asks to stop: once at a record, once after an epoch.

    Return what the callbacks of this rank were told, and where the run ended.
    """
    from test_callbacks import Diary
    from test_engine import tiny

    from rsa_fast.training.engine import train

    folder, told = Path(sys.argv[4]), {}
    for place, stop in (("record", {"stop_step": 4}), ("epoch", {"stop_epoch": 1})):
        diary = Diary(**(stop if rank() == 1 else {}))
        recipe = tiny(knn_every_epochs=1, checkpoint_every_epochs=2)
        result = train(recipe, folder / "data", folder / place, callbacks=[diary])
        weight = next(iter(diary.run.method.encoder.parameters())).detach()
        told[place] = {
            "records": diary.records,
            "epochs": diary.epochs,
            "step": diary.run.step,
            "returned": result is not None,
            "weight": weight,
        }
    return told


def mean(x: torch.Tensor) -> torch.Tensor:
    if world_size() > 1:
        dist.all_reduce(x)
    return x / world_size()


def steps_in_every_way() -> dict[tuple, tuple]:
    import test_networks

    return test_networks.steps_in_every_way()


def steps_in_every_case() -> dict[str, dict]:
    import test_accumulation

    return test_accumulation.steps_in_every_case()


def losses_and_gradients() -> dict[str, tuple]:
    import test_barlow_twins

    return test_barlow_twins.losses_and_gradients()


def losses_and_banks() -> dict[str, tuple]:
    import test_inst_dis

    return test_inst_dis.losses_and_banks()


def embeddings() -> dict[str, dict]:
    import test_embed

    return test_embed.embeddings_of_ranks(Path(sys.argv[4]))


def multi_crop_steps() -> dict[str, tuple]:
    import test_swav

    return test_swav.multi_crop_steps()


def finetuned() -> tuple:
    import test_finetune

    return test_finetune.finetuned(Path(sys.argv[4]))


def sync_batchnorm() -> list[tuple]:
    """Return outputs, input gradients and running statistics of this rank's part.

    The inputs are 2-D and 4-D, and the layers are affine or not.
    """
    from rsa_fast.syncbn import convert_batchnorm

    results = []
    for layer, x, weight in batchnorm_cases():
        layer = convert_batchnorm(layer, 1)
        x, weight = mine(x).clone().requires_grad_(), mine(weight)
        out = layer(x)
        (out * weight).sum().backward()
        grads = [p.grad for p in layer.parameters()]
        for grad in grads:
            dist.all_reduce(grad)
        results.append((out.detach(), x.grad, grads, layer.running_mean, layer.running_var))
    return results


def batchnorm_cases():
    """Yield layers, inputs and weights of the outputs: 2-D and 4-D, affine or not."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((8, 5), (4, 5, 3, 2)):
        for affine in (True, False):
            kind = torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d
            layer = kind(5, affine=affine).double()
            if affine:
                torch.nn.init.uniform_(layer.weight, generator=generator)
            # The values are far from zero, so that cancellation would show.
            x = 100 + torch.randn(shape, generator=generator, dtype=torch.float64)
            yield layer, x, torch.randn(shape, generator=generator, dtype=torch.float64)


if __name__ == "__main__":
    work, me, ranks, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / work}.rendezvous", rank=me, world_size=ranks
    )
    torch.save(globals()[work](), folder / f"{work}_{me}.pt")
    dist.destroy_process_group()
