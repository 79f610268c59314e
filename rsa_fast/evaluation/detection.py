"""Transfer to detection: a pre-trained ResNet-50 in Mask R-CNN with FPN, fine-tuned on COCO.

    result = detect(Path("step_00125000.pt"), data=Path("data/coco"), out=Path("runs/coco-1x"))

This is section 4.4 of the RSA paper (Tables 5 and 6). The paper follows InfoMin (its [43]), whose
detectron2 settings are R_50_FPN_{1x,2x}.yaml in github.com/HobbitLong/PyContrast:

- All layers are trained.
- BatchNorm is trained too, with statistics of the whole batch of 16. It is in the backbone. It is
  also added after the convolutions of the FPN, of the box head (4 convolutions, 1 linear layer) and
  of the mask head.
- Before the evaluation, BatchNorm's statistics are computed again from 200 batches.
- Images are flipped at random, and their short sides are 640 to 800 px.

The learning rates are the paper's.

torchvision's model differs from detectron2's:

- RoIAlign is not `aligned`. It samples 2 x 2 points, while detectron2 samples as many as the box
  needs.
- The box losses are smooth L1 with beta 1/9 instead of L1.
- Mask targets are cut from bitmaps instead of polygons.
- Images are resized without antialiasing.
- Linear and last layers have torchvision's initialisation.

Half precision (`precision`) is our addition. There is one process on one device. BatchNorm over its
batch is the same as SyncBN over the same batch on eight GPUs.
"""

from __future__ import annotations

import json
import logging
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

from rsa_fast.evaluation.encoders import load_encoder
from rsa_fast.pipelines.coco import CocoImages, open_loader, reading_plan
from rsa_fast.pipelines.files import json_text, write_text
from rsa_fast.pipelines.order import Order
from rsa_fast.training import checkpoint
from rsa_fast.training.engine import StoppedError, stop_signals
from rsa_fast.training.metrics import Metrics, versions_and_hardware
from rsa_fast.training.run_folder import add_start, hold_folder, prepare_folder, this_process
from rsa_fast.training.step import choose_device, choose_dtype

log = logging.getLogger("rsa_fast")

Sample = tuple[Tensor, dict[str, Tensor]]  # an image and its objects, as in `CocoImages`

# Steps, and the learning rate for a batch of 16 (RSA paper 4.4).
SCHEDULES = {"1x": (90_000, 0.02), "2x": (180_000, 0.03)}
# These are detectron2's values, where torchvision's differ. Each training image gets one of these
# short sides, in px, at random. The evaluation uses the last one.
MODEL_OPTIONS: dict[str, Any] = {
    "min_size": (640, 672, 704, 736, 768, 800),
    "rpn_post_nms_top_n_train": 1000,
}
PRECISE_BN_STEPS, CHECKPOINT_STEPS, LOG_STEPS = 200, 5000, 20


def detect(
    encoder_path: str | Path,
    data: str | Path,
    out: str | Path,
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
    key: str | None = None,
) -> dict[str, Any]:
    """Fine-tune the encoder of a checkpoint on COCO-format `data` and evaluate it on its val2017.

    The result, which is also in `out/result.json`, contains the settings, the step, and AP, AP50
    and AP75 of boxes and masks in percent. `steps` shortens the schedule. The learning rate then
    drops after the same fractions of the steps. The learning rate is scaled by `batch_size` / 16.
    `resume` continues from the newest checkpoint in `out` with the same batches and random numbers,
    or starts if there is none. If the run is finished, the stored result is returned and nothing is
    changed. `stop_at_step` writes a checkpoint after that step and returns without an evaluation.
    `key` chooses among several networks in the encoder's file (see `load_encoder`). As in `train`,
    a signal ends the training after the current step: the checkpoint is written and StoppedError is
    raised.

    Before any training, raises ValueError or FileNotFoundError if the encoder is not the standard
    ResNet-50, if the data are incomplete or contradict themselves, or if the settings of a resumed
    run have changed. Raises BlockingIOError if another process trains in `out`, and
    FloatingPointError if the loss is not finite.
    """
    data, out = Path(data), Path(out)
    train, val = CocoImages(data, "train2017"), CocoImages(data, "val2017")
    if train.categories != val.categories:
        differ = sorted({name for _, name in train.categories.items() ^ val.categories.items()})
        raise ValueError(
            f"train2017 and val2017 under {data} differ in the id or the name of: "
            f"{', '.join(differ[:10])}. Use annotations with the same categories"
        )
    train.ids = [image_id for image_id in train.ids if train.objects(image_id)]
    order = Order(len(train), batch_size, seed)
    total_steps, peak_lr = steps or SCHEDULES[schedule][0], SCHEDULES[schedule][1] * batch_size / 16
    encoder_path = checkpoint.newest_checkpoint(encoder_path)
    encoder, recipe = load_encoder(encoder_path, key=key)
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
        "encoder": f"{encoder_path} ({key})" if key else str(encoder_path),
        "schedule": schedule,
        "steps": total_steps,
        "batch_size": batch_size,
        "seed": seed,
        "precision": precision,
        "images": len(train),
        "classes": len(train.categories),
    }
    if resume and (stored := finished_result(settings, out)):
        log.info(f"the run in {out} is finished: nothing is changed, see its stored result")
        return stored

    def losses_of(batch: list[Sample], step: int) -> dict[str, Tensor]:
        images, targets = on_device(batch, place)
        # The model chooses image sizes and proposals at random. A resumed run chooses the same.
        torch.manual_seed(seed + step)
        with torch.autocast(place.type, dtype, enabled=dtype != torch.float32):
            losses: dict[str, Tensor] = model(images, targets)
        return losses

    with hold_folder(out, resume, overwrite), stop_signals() as signals_received:
        prepare_folder(out, resume, overwrite)
        step = restore(parts, settings, out, dtype) if resume else 0
        start = {"data": [str(data.absolute())], "step": step}
        add_start(out, this_process() | versions_and_hardware() | start)
        stop = min(stop_at_step or total_steps, total_steps)
        plan_end = total_steps + min(PRECISE_BN_STEPS, total_steps)
        plan = reading_plan(order, train.portrait(), step, plan_end)
        batches = iter(open_loader(train, plan, workers, place))
        model.train()
        with Metrics(out, total_steps, step) as metrics:
            log_time, log_step = time.perf_counter(), step
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
                if signals_received:
                    stop = step
                if step % LOG_STEPS == 0 or step == stop:
                    values = {name: value.item() for name, value in losses.items()}
                    loss = sum(values.values())
                    if not math.isfinite(loss):
                        raise FloatingPointError(
                            f"the losses are {values} at step {step}: lower --batch-size, which "
                            "also lowers the learning rate"
                        )
                    step_ms = 1e3 * (time.perf_counter() - log_time) / (step - log_step)
                    metrics.write(
                        {"step": step, "lr": lr, "loss": loss, **values, "step_ms": step_ms}
                    )
                    log_time, log_step = time.perf_counter(), step
                if step % CHECKPOINT_STEPS == 0 or step == stop:
                    state = {name: part.state_dict() for name, part in parts.items()}
                    state |= {"step": step, "recipe": settings, "dtype": checkpoint.name_of(dtype)}
                    checkpoint.save(out / "checkpoints", state, keep_last=2)
        if signals_received and step < total_steps:
            raise StoppedError.after(signals_received[0], step)
        result = {"out": str(out), **settings, "step": step}
        if step == total_steps:
            precise_bn(model, (losses_of(batch, step + i) for i, batch in enumerate(batches)))
            predictions = find_objects(model, val, device=place, dtype=dtype, workers=workers)
            result |= coco_scores(val.coco, predictions)
        write_text(out / "result.json", json_text(result))
        return result


def learning_rate(step: int, total_steps: int, peak_lr: float) -> float:
    """The learning rate of a step, counted from 0, as in detectron2.

    A linear warm-up starts at a thousandth and takes 1000 steps, or a tenth of a shorter run. The
    rate falls to a tenth after 2/3 of the steps and to a hundredth after 8/9 (60k and 80k of 90k).
    """
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
    """Mask R-CNN R50-FPN with the encoder's weights and BatchNorm statistics in its backbone.

    It predicts `classes` classes and the background. It normalises images `(3, H, W)` in [0, 1] by
    `mean` and `std`, or by ImageNet's if they are None, and has the `MODEL_OPTIONS`. Raises
    ValueError unless the encoder has the keys and shapes of a ResNet-50.
    """
    model = maskrcnn_resnet50_fpn_v2(
        weights=None,
        weights_backbone=None,
        num_classes=classes + 1,
        image_mean=mean,
        image_std=std,
        **MODEL_OPTIONS,
    )
    # detectron2's head has one convolution, and torchvision's has two.
    model.rpn.head = RPNHead(model.backbone.out_channels, 3)
    shapes, expected_shapes = (
        {key: tuple(value.shape) for key, value in module.state_dict().items()}
        for module in (encoder, model.backbone.body)
    )
    if shapes != expected_shapes:
        key, _ = min(shapes.items() ^ expected_shapes.items())
        raise ValueError(
            "detection needs a ResNet-50 with the ImageNet stem and width 64; in this encoder "
            f"{key} is {shapes.get(key, 'missing')}, not {expected_shapes.get(key, 'expected')}"
        )
    model.backbone.body.load_state_dict(encoder.state_dict())
    # torchvision decodes boxes in the dtype of these outputs. In bf16, numbers above 512 are
    # rounded to multiples of 4 px.
    for head in (model.rpn.head, model.roi_heads.box_predictor):
        for layer in head.children():
            layer.register_forward_hook(lambda layer, inputs, output: output.float())
    return model


def build_sgd(model: nn.Module) -> torch.optim.SGD:
    """SGD as in detectron2: momentum 0.9, weight decay 1e-4 except for BatchNorm, which has none.

    The caller must set the learning rate.
    """
    groups: dict[float, list[nn.Parameter]] = {0.0: [], 1e-4: []}
    for module in model.modules():
        decay = 0.0 if isinstance(module, nn.BatchNorm2d) else 1e-4
        groups[decay] += module.parameters(recurse=False)
    params = [{"params": group, "weight_decay": decay} for decay, group in groups.items()]
    return torch.optim.SGD(params, lr=0.0, momentum=0.9)


def finished_result(settings: dict[str, Any], out: Path) -> dict[str, Any] | None:
    """The stored result of the run in `out` if it has these settings and was evaluated."""
    try:
        result: dict[str, Any] = json.loads((out / "result.json").read_text())
    except (OSError, ValueError):
        return None
    wanted = {**settings, "step": settings["steps"]}
    return result if wanted.items() <= result.items() and "box_ap" in result else None


def restore(parts: dict[str, Any], settings: dict[str, Any], out: Path, dtype: torch.dtype) -> int:
    """Load the newest checkpoint in `out` into model, optimiser and scaler. Returns its step.

    The step is 0 if there is no checkpoint. `dtype` is the compute type in which the run continues.
    Raises ValueError if the checkpoint's settings are not `settings`.
    """
    if not checkpoint.paths_in(out / "checkpoints"):
        log.info(f"{out} has no checkpoint yet: starting at step 0")
        return 0
    state = checkpoint.load_latest(out / "checkpoints")
    saved_settings = state["recipe"]
    differences = [
        f"  {key}: {saved_settings.get(key)!r} then, {value!r} now"
        for key, value in settings.items()
        if saved_settings.get(key) != value
    ]
    if differences:
        heading = "the settings are not those with which this run was started:"
        raise ValueError("\n".join([heading, *differences]))
    for name in ("method", "optimizer"):
        parts[name].load_state_dict(state[name])
    if changed_type := checkpoint.restore_scaler(parts["scaler"], state, dtype):
        log.warning(changed_type)
    return int(state["step"])


@torch.no_grad()
def precise_bn(model: nn.Module, forwards: Iterable[Any]) -> None:
    """Replace BatchNorm's running statistics by their mean over several forward passes.

    Iterating `forwards` runs these passes. Afterwards, use the model for evaluation only. This is
    detectron2's PRECISE_BN.
    """
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None  # torch then computes a cumulative mean
    for _ in forwards:
        pass


@torch.no_grad()
def find_objects(
    model: MaskRCNN, images: CocoImages, device: torch.device, dtype: torch.dtype, workers: int
) -> list[dict[str, Any]]:
    """The objects that the model finds, one row each in COCO's result format.

    Boxes are x, y, width and height in px, masks are run-length coded.
    """
    from pycocotools.mask import encode

    categories, rows = list(images.categories), []
    model.eval()
    plan = ([(index, False)] for index in range(len(images)))
    for image_id, batch in zip(images.ids, open_loader(images, plan, workers, device), strict=True):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            (objects,) = model(on_device(batch, device)[0])
        objects["boxes"][:, 2:] -= objects["boxes"][:, :2]
        bitmaps = (objects["masks"][:, 0] > 0.5).byte().permute(1, 2, 0)  # (H, W, N)
        masks = encode(np.asfortranarray(bitmaps.cpu().numpy()))
        numbers = (objects[key].tolist() for key in ("labels", "boxes", "scores"))
        for label, box, score, mask in zip(*numbers, masks, strict=True):
            row = {
                "image_id": image_id,
                "category_id": categories[label - 1],
                "bbox": box,
                "score": score,
                "segmentation": mask,
            }
            rows.append(row)
    return rows


def coco_scores(coco: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """AP (mean over IoU .50 to .95), AP50 and AP75 of boxes and masks in percent.

    pycocotools computes them. Its own report goes to stderr.
    """
    from pycocotools.cocoeval import COCOeval

    names = ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75")
    scores = dict.fromkeys(names, 0.0)
    if not rows:  # pycocotools fails without rows
        return scores
    with redirect_stdout(sys.stderr):
        results = coco.loadRes(rows)
        for name, kind in (("box", "bbox"), ("mask", "segm")):
            evaluation = COCOeval(coco, results, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            for i, key in enumerate(("ap", "ap50", "ap75")):
                scores[f"{name}_{key}"] = 100 * float(evaluation.stats[i])
    return scores


def on_device(
    batch: list[Sample], device: torch.device
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images `(3, H, W)` in [0, 1] and targets, as torchvision's detection models expect them."""
    images = [image.to(device, non_blocking=True) / 255 for image, _ in batch]
    targets = [
        {key: value.to(device, non_blocking=True) for key, value in target.items()}
        for _, target in batch
    ]
    return images, targets
