"""Transfer: fine-tune a pre-trained ResNet-50 as Mask R-CNN with FPN on COCO (RSA paper 4.4, Tables 5 and 6).

    result = detect(Path("step_00125000.pt"), data=Path("data/coco"), out=Path("runs/coco-1x"), schedule="1x")

The paper follows InfoMin (its [43]), whose detectron2 settings are R_50_FPN_{1x,2x}.yaml in github.com/HobbitLong/PyContrast:
all layers are trained; BatchNorm learns and is taken over the whole batch of 16, in the backbone and, new, after the FPN's,
the box head's (4 convolutions, 1 linear layer) and the mask head's convolutions; its statistics are taken anew from 200
batches before the evaluation; short sides of 640 to 800 px, flips. The learning rates are the paper's.

torchvision's model differs from detectron2's: RoIAlign is not `aligned` and samples 2 x 2 points, not as many as the box
needs; box losses are smooth L1 with beta 1/9, not L1; mask targets are cut from bitmaps, not polygons; images are resized
without antialiasing; linear and last layers have torchvision's initialisation. Half precision (`precision`) is an addition.
One process on one device: BatchNorm over its batch is what SyncBN is over the same batch on eight GPUs.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.rpn import RPNHead

from pipelines.coco import CocoImages, open_loader, reading_plan
from pipelines.order import Order
from rsa_fast.evaluation.encoders import load_encoder
from rsa_fast.training import checkpoint
from rsa_fast.training.metrics import Metrics, environment
from rsa_fast.training.run_folder import prepare_folder
from rsa_fast.training.step import choose_device, choose_dtype

Sample = tuple[Tensor, dict[str, Tensor]]  # an image and its objects: `CocoImages`

SCHEDULES = {
    "1x": (90_000, 0.02),
    "2x": (180_000, 0.03),
}  # steps, learning rate of a batch of 16 (RSA paper 4.4)
# detectron2's where torchvision's differ: one short side in px is drawn per image, the last is for evaluation
MODEL_OPTIONS: dict[str, Any] = {
    "min_size": (640, 672, 704, 736, 768, 800),
    "rpn_post_nms_top_n_train": 1000,
}
PRECISE_BN_STEPS, CHECKPOINT_STEPS, LOG_STEPS = 200, 5000, 20


def detect(
    encoder_path: Path,
    data: Path,
    out: Path,
    *,
    schedule: str = "1x",
    steps: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    workers: int = 4,
    device: str = "auto",
    precision: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    stop_at_step: int | None = None,
) -> dict[str, Any]:
    """Fine-tune the encoder of a checkpoint on `data`, evaluate on its val2017; the result is also in `out/result.json`.

    `steps` shortens a schedule, its drops stay at the same fractions; the learning rate is scaled by `batch_size` / 16.
    `resume` goes on from the newest checkpoint in `out` with the same batches and dice. AP is in percent. Raises ValueError
    or FileNotFoundError, before any training, for an encoder that is not the standard ResNet-50, for data that is incomplete
    or contradicts itself, and when a resumed run's settings changed; FloatingPointError when the loss is not finite.
    """
    train, val = CocoImages(data, "train2017"), CocoImages(data, "val2017")
    if train.categories != val.categories:
        differ = sorted({name for _, name in train.categories.items() ^ val.categories.items()})
        raise ValueError(
            f"train2017 and val2017 under {data} differ in the id or the name of: {', '.join(differ[:10])}"
        )
    train.ids = [image_id for image_id in train.ids if train.objects(image_id)]
    order = Order(len(train), batch_size, seed)
    total_steps, peak_lr = steps or SCHEDULES[schedule][0], SCHEDULES[schedule][1] * batch_size / 16
    encoder, recipe = load_encoder(encoder_path)
    place = choose_device(device)
    torch.backends.cudnn.benchmark = False  # image sizes change from batch to batch
    dtype = choose_dtype(precision, place)
    torch.manual_seed(seed)
    mean_std = (recipe.views.mean, recipe.views.std) if recipe else (None, None)
    model = build_model(encoder, len(train.categories), *mean_std).to(place)
    optimizer = build_sgd(model)
    scaler = GradScaler(place.type, enabled=dtype == torch.float16)
    parts = {"method": model, "optimizer": optimizer, "scaler": scaler}
    settings = {
        "encoder": str(encoder_path),
        "schedule": schedule,
        "steps": total_steps,
        "batch_size": batch_size,
    }
    settings |= {
        "seed": seed,
        "precision": precision,
        "images": len(train),
        "classes": len(train.categories),
    }
    prepare_folder(out, resume, overwrite)
    step = restore(parts, settings, out) if resume else 0
    (out / "env.json").write_text(json.dumps(environment(), indent=1))

    def losses_of(batch: list[Sample], step: int) -> dict[str, Tensor]:
        images, targets = on_device(batch, place)
        torch.manual_seed(
            seed + step
        )  # the model draws image sizes and proposals; a resumed run draws the same
        with torch.autocast(place.type, dtype, enabled=dtype != torch.float32):
            losses: dict[str, Tensor] = model(images, targets)
        return losses

    stop = min(stop_at_step or total_steps, total_steps)
    plan = reading_plan(
        order, train.portrait(), step, total_steps + min(PRECISE_BN_STEPS, total_steps)
    )
    batches = iter(open_loader(train, plan, workers, place))
    model.train()
    with Metrics(out, total_steps, step) as metrics:
        began, began_step = time.perf_counter(), step
        while step < stop:
            lr = learning_rate(step, total_steps, peak_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            losses = losses_of(next(batches), step)
            first, *others = losses.values()
            torch.autograd.backward(scaler.scale(sum(others, first)))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % LOG_STEPS == 0 or step == stop:
                values = {name: value.item() for name, value in losses.items()}
                loss = sum(values.values())
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"the losses are {values} at step {step}: lower --batch-size, the rate follows it"
                    )
                step_ms = 1e3 * (time.perf_counter() - began) / (step - began_step)
                metrics.write({"step": step, "lr": lr, "loss": loss, **values, "step_ms": step_ms})
                began, began_step = time.perf_counter(), step
            if step % CHECKPOINT_STEPS == 0 or step == stop:
                state = {name: part.state_dict() for name, part in parts.items()}
                checkpoint.save(
                    out / "checkpoints", {"step": step, "recipe": settings, **state}, keep_last=2
                )
    result = {"out": str(out), **settings, "step": step}
    if step == total_steps:
        precise_bn(model, (losses_of(batch, step + i) for i, batch in enumerate(batches)))
        result |= coco_scores(val.coco, find_objects(model, val, place, dtype, workers))
    (out / "result.json").write_text(json.dumps(result))
    return result


def learning_rate(step: int, total_steps: int, peak_lr: float) -> float:
    """Of a step counted from 0, as detectron2's: a tenth from 2/3 and a hundredth from 8/9 of the steps (60k and 80k of 90k);
    before that a linear warm-up from a thousandth over 1000 steps, or a tenth of the run where that is less."""
    warmup = min(1000, total_steps // 10)
    ramp = min(step / warmup, 1) if warmup else 1
    drops = (3 * step >= 2 * total_steps) + (9 * step >= 8 * total_steps)
    return peak_lr * 0.1**drops * (0.001 * (1 - ramp) + ramp)


def build_model(
    encoder: nn.Module,
    classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> MaskRCNN:
    """Mask R-CNN R50-FPN for `classes` classes and background, its backbone the encoder's weights and BatchNorm statistics.

    The model normalises images by `mean` and `std`, or by ImageNet's if they are None, and takes
    `MODEL_OPTIONS`. Raises ValueError unless the encoder has the keys and shapes of a ResNet-50.
    """
    model = maskrcnn_resnet50_fpn_v2(
        weights=None,
        weights_backbone=None,
        num_classes=classes + 1,
        image_mean=mean,
        image_std=std,
        **MODEL_OPTIONS,
    )
    model.rpn.head = RPNHead(
        model.backbone.out_channels, 3
    )  # one convolution deep, as detectron2's
    given, wanted = (
        {key: tuple(value.shape) for key, value in module.state_dict().items()}
        for module in (encoder, model.backbone.body)
    )
    if given != wanted:
        key, _ = min(given.items() ^ wanted.items())
        raise ValueError(
            f"transfer wants a ResNet-50 with the ImageNet stem and width 64; in this encoder {key} is "
            f"{given.get(key, 'missing')}, not {wanted.get(key, 'wanted')}"
        )
    model.backbone.body.load_state_dict(encoder.state_dict())
    for head in (model.rpn.head, model.roi_heads.box_predictor):
        for layer in (
            head.children()
        ):  # torchvision decodes boxes in their type: bf16 has steps of 4 px from 512 px on
            layer.register_forward_hook(lambda layer, inputs, output: output.float())
    return model


def build_sgd(model: nn.Module) -> torch.optim.SGD:
    """Momentum .9, weight decay 1e-4 but none on BatchNorm (detectron2); the caller sets the learning rate."""
    groups: dict[float, list[nn.Parameter]] = {0.0: [], 1e-4: []}
    for module in model.modules():
        groups[0.0 if isinstance(module, nn.BatchNorm2d) else 1e-4] += module.parameters(
            recurse=False
        )
    return torch.optim.SGD(
        [{"params": p, "weight_decay": decay} for decay, p in groups.items()], lr=0.0, momentum=0.9
    )


def restore(parts: dict[str, Any], settings: dict[str, Any], out: Path) -> int:
    """Put the newest checkpoint into model, optimiser and scaler; returns its step. Raises ValueError for other settings."""
    state = checkpoint.load_latest(out / "checkpoints")
    then = state["recipe"]
    differ = [
        f"  {key}: {then.get(key)!r} then, {now!r} now"
        for key, now in settings.items()
        if then.get(key) != now
    ]
    if differ:
        raise ValueError(
            "\n".join(["the settings are not those this run was started with:", *differ])
        )
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"])


@torch.no_grad()
def precise_bn(model: nn.Module, forwards: Iterable[Any]) -> None:
    """Make BatchNorm's running statistics their plain mean over the forward passes that iterating `forwards` runs
    (detectron2's PRECISE_BN); the model is for evaluation then."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative mean
    for _ in forwards:
        pass


@torch.no_grad()
def find_objects(
    model: MaskRCNN, images: CocoImages, device: torch.device, dtype: torch.dtype, workers: int
) -> list[dict[str, Any]]:
    """What the model finds, as rows of COCO's result format: boxes x, y, width, height in px, masks run-length coded."""
    from pycocotools.mask import encode

    categories, rows = list(images.categories), []
    model.eval()
    plan = ([(index, False)] for index in range(len(images)))
    for image_id, batch in zip(images.ids, open_loader(images, plan, workers, device), strict=True):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            (found,) = model(on_device(batch, device)[0])
        found["boxes"][:, 2:] -= found["boxes"][:, :2]
        masks = encode(
            np.asfortranarray((found["masks"][:, 0] > 0.5).byte().permute(1, 2, 0).cpu().numpy())
        )
        numbers = (found[key].tolist() for key in ("labels", "boxes", "scores"))
        for label, box, score, mask in zip(*numbers, masks, strict=True):
            row = {
                "image_id": image_id,
                "category_id": categories[label - 1],
                "bbox": box,
                "score": score,
            }
            rows.append({**row, "segmentation": mask})
    return rows


def coco_scores(coco: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """AP (mean over IoU .50 to .95), AP50 and AP75 of boxes and masks in percent, by pycocotools; its report goes to stderr."""
    from pycocotools.cocoeval import COCOeval

    scores = dict.fromkeys(
        ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"), 0.0
    )
    if not rows:  # pycocotools fails on none
        return scores
    with redirect_stdout(sys.stderr):
        results = coco.loadRes(rows)
        for name, kind in (("box", "bbox"), ("mask", "segm")):
            evaluation = COCOeval(coco, results, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            scores |= {
                f"{name}_{key}": 100 * float(evaluation.stats[i])
                for i, key in enumerate(("ap", "ap50", "ap75"))
            }
    return scores


def on_device(
    batch: list[Sample], device: torch.device
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images in [0, 1] and targets, as torchvision's detection models take them."""
    images = [image.to(device, non_blocking=True) / 255 for image, _ in batch]
    targets = [
        {key: value.to(device, non_blocking=True) for key, value in target.items()}
        for _, target in batch
    ]
    return images, targets
