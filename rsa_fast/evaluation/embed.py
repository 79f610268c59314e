"""Write the features of all images of a folder to a file for other programs.

    result = embed("runs/a", None, "emb.parquet")  # for the images that the run was trained on
    result = embed("moco_v2_800ep_pretrain.pth.tar", "my_photos", "emb.npz", dataset="imagenet1k")

| file | content |
|---|---|
| `.npz` | `features` (N, D), `labels` (N,) int64, `filenames` (N,), `classes` (C,) |
| `.npy` | the features (N, D); beside it `.npy.tsv` with the columns filename, label, class |
| `.parquet` | columns filename, label, class, and embedding, which has a list of D numbers |
| `.csv` | columns filename, embedding_0, ...; then label and class if the data have classes |

Features are float32, as the encoder returns them: they are not normalised. A filename is relative
to the data folder. Packed images have no names, so their numbers are used. A label is the number of
a class. If an image has no class, the label is -1 in arrays, and empty or null elsewhere.

The rows are in the order of the images in their source, whatever the number of ranks. They are
written while they are computed, so only the images' numbers stay in memory. A second file, with
`.json` after the name, contains the result of `embed`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, Literal, TypeVar
from zipfile import ZipFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsa_fast.distributed import gather, process_group, rank, world_size
from rsa_fast.evaluation.encoders import load_encoder
from rsa_fast.evaluation.evaluate import checked_overrides, embed_in_own_dtype, recipe_for_images
from rsa_fast.evaluation.features import eval_mode, plain_images
from rsa_fast.pipelines.files import json_text, write_text, write_whole
from rsa_fast.pipelines.layouts import Data, has_test_split, inventory, places_of
from rsa_fast.pipelines.machine import PIP
from rsa_fast.pipelines.manifest import CHUNK, Manifest
from rsa_fast.pipelines.plain import PlainImages
from rsa_fast.training.checkpoint import newest_checkpoint
from rsa_fast.training.run_folder import places_of_checkpoint
from rsa_fast.training.step import choose_device, choose_dtype

log = logging.getLogger("rsa_fast")

BLOCK_ROWS = 4096  # number of rows that are written at a time: 32 MiB with 2048 features
LOG_EVERY_S = 60.0

Block = tuple[np.ndarray, np.ndarray]  # sample ids (n,), their features (n, D) float32
Write = Callable[[BinaryIO, Iterator[Block], Manifest], None]
T = TypeVar("T")


def embed(
    checkpoint: str | Path,
    data: Data | None,
    out: str | Path,
    *,
    split: Literal["pretrain", "train", "test"] = "pretrain",
    unlabelled: bool | None = None,
    dataset: str | None = None,
    resize_px: int | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    encoder: nn.Module | None = None,
    key: str | None = None,
) -> dict[str, Any]:
    """Write the features of the images in `data` to the file `out`. Its suffix is the format.

    This is what `rsa-fast embed` runs. Returns what the command prints: `rows`, `dim`, `seconds`,
    `images_per_s`, the encoder, the images and how they were read, such as `test_transform`.

    `checkpoint` is a run's folder, whose newest checkpoint is read, or any file that `load_encoder`
    reads. `encoder` and `key` have the same meaning as there. Without `data`, the images are those
    that the run was trained on. `split` chooses the images for pre-training (all except the test
    images), only the labelled images among them, or the test images. With `unlabelled`, all images
    below the folder are read, without classes. If `unlabelled` is None, the value in the checkpoint
    is used. `dataset`, `resize_px` and `overrides` determine how images are sized and normalised,
    as in `evaluate`.

    Images that cannot be read are left out and counted. With several ranks, each computes its part,
    all return the result, and rank 0 writes the file.

    Raises ValueError for an unknown suffix, for a missing library, and for a checkpoint without a
    recipe if `dataset` is missing. Raises FileNotFoundError if the checkpoint or the images do not
    exist.
    """
    out = Path(out)
    write = writer_of(out)
    path = newest_checkpoint(checkpoint)
    images_at = places_of(places_of_checkpoint(checkpoint) if data is None else data)
    network, recipe = load_encoder(path, encoder, key)
    changes: dict[str, Any] = {"on_bad_image": "skip"}
    if split != "test":
        changes["val_fraction"] = 0.0  # no images are held out for validation
    if unlabelled is not None:
        changes["unlabelled"] = unlabelled
    changes |= checked_overrides(overrides or {})
    recipe = recipe_for_images(path, recipe, images_at, dataset, resize_px, changes)
    with process_group(recipe.device, recipe.timeout_s):
        source = recipe.open_source(images_at, split)
        if rank() == 0:
            log.info(inventory(source))
            if split != "test" and not recipe.unlabelled and any(map(has_test_split, images_at)):
                log.info("the test images are not included: --split test writes those")
        device = choose_device(recipe.device)
        dtype = choose_dtype(recipe.precision, device)
        images = plain_images(source, recipe, device, dtype)
        network = network.to(device)
        started, done = time.perf_counter(), Progress()
        with eval_mode(network), torch.no_grad():
            blocks = done.joined(features_of(network, images))
            if rank() == 0:
                out.parent.mkdir(parents=True, exist_ok=True)
                write_whole(out, lambda file: write(file, blocks, source.manifest))
                if write is write_npy:
                    ids = np.concatenate(done.ids)
                    names = beside(out, ".tsv")
                    write_whole(names, lambda file: write_names(file, ids, source.manifest))
            for _ in blocks:  # the other ranks only compute
                pass
        seconds = time.perf_counter() - started
        result = {
            "out": str(out),
            "rows": done.rows,
            "dim": done.dim,
            "seconds": round(seconds, 3),
            "images_per_s": round(len(source.manifest) / seconds, 1),
            "left_out": len(source.manifest) - done.rows + len(source.bad),
            "checkpoint": str(path),
            **({"key": key} if key else {}),
            "checkpoint_sha256": sha256_of(path),
            "data": [str(place.absolute()) for place in images_at],
            "split": split,
            "val_fraction": recipe.val_fraction,
            "unlabelled": recipe.unlabelled,
            "exif_orientation": recipe.exif_orientation,
            "data_fingerprint": source.manifest.fingerprint,
            "test_transform": images.transform,
            "mean": recipe.views.mean,
            "std": recipe.views.std,
            "l2_normalised": False,
        }
        if rank() == 0:
            if result["left_out"]:
                log.warning(f"{result['left_out']:,} images could not be read and have no row")
            write_text(beside(out, ".json"), json_text(result, indent=1))
    return result


def beside(out: Path, suffix: str) -> Path:
    """The path of a file that belongs to `out`, such as `emb.npz.json`."""
    return out.with_name(out.name + suffix)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):  # hashlib.file_digest came with Python 3.11
            digest.update(block)
    return digest.hexdigest()


def features_of(encoder: nn.Module, images: PlainImages) -> Iterator[Block]:
    """Blocks of consecutive readable images and their features, in host memory, on every rank.

    The features of a batch are fetched only after the next batch is queued on the device. The
    device thus does not wait for the host.
    """
    for ids, features, readable in delayed(queued(encoder, images)):
        kept = readable.cpu().numpy()
        yield ids[kept], features.float().cpu().numpy()[kept]


def queued(encoder: nn.Module, images: PlainImages) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """For each batch of all ranks: sample ids, features, and whether the images could be read.

    The last two are still being computed on the device.
    """
    count, device = len(images.source.manifest), images.device
    batches = iter(images)
    black = torch.zeros(1, 3, images.size_px, images.size_px, device=device, dtype=images.dtype)
    no_features = embed_in_own_dtype(encoder, black)[:0]
    for first in range(0, count, images.batch_size * world_size()):
        ids = np.arange(first, min(count, first + images.batch_size * world_size()))
        own = ids[rank() :: world_size()].tolist()
        # The last batch may have no image for this rank.
        features = embed_in_own_dtype(encoder, next(batches)[0]) if own else no_features
        readable = torch.tensor([sample not in images.bad for sample in own], dtype=torch.bool)
        yield ids, of_all_ranks(features, len(ids)), of_all_ranks(readable.to(device), len(ids))


def of_all_ranks(x: Tensor, count: int) -> Tensor:
    """The rows of all ranks, `(count, ...)`. Each rank passes every `world_size`-th row.

    Unlike `features.gather_rows`, it does not wait for the device.
    """
    longest = -(-count // world_size())
    padded = F.pad(x, [0, 0] * (x.ndim - 1) + [0, longest - len(x)])
    by_rank = torch.unflatten(gather(padded), 0, (world_size(), -1))
    return by_rank.transpose(0, 1).flatten(0, 1)[:count]


def delayed(items: Iterator[T]) -> Iterator[T]:
    """Yield each item only when the next one is available."""
    previous = next(items)
    for item in items:
        yield previous
        previous = item
    yield previous


class Progress:
    """Joins blocks into larger ones, counts their rows, and logs the number once a minute."""

    def __init__(self) -> None:
        self.rows = self.dim = 0
        self.ids: list[np.ndarray] = []  # the sample ids of the rows

    def joined(self, blocks: Iterator[Block]) -> Iterator[Block]:
        """The joined blocks. Raises ValueError if there is no row."""
        waiting: list[Block] = []
        started = logged = time.monotonic()
        for block in blocks:
            waiting.append(block)
            self.ids.append(block[0])
            self.rows, self.dim = self.rows + len(block[0]), block[1].shape[1]
            if sum(len(ids) for ids, _ in waiting) >= BLOCK_ROWS:
                yield join(waiting)
                waiting = []
            now = time.monotonic()
            if rank() == 0 and now - logged >= LOG_EVERY_S:
                logged = now
                log.info(f"{self.rows:,} rows, {self.rows / (now - started):,.1f} images/s")
        if not self.rows:
            raise ValueError("none of the images could be read")
        if waiting:
            yield join(waiting)


def join(blocks: list[Block]) -> Block:
    ids, features = zip(*blocks, strict=True)
    return np.concatenate(ids), np.concatenate(features)


def writer_of(out: Path) -> Write:
    """The function that writes the format of `out`.

    Raises ValueError if there is no such format, or its library is missing.
    """
    if out.suffix not in WRITERS:
        raise ValueError(
            f"no format for --out {out.name}: the name must end in {', '.join(WRITERS)}"
        )
    if out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ValueError(f"{out.name} needs pyarrow: {PIP} install pyarrow")
    return WRITERS[out.suffix]


def filename(manifest: Manifest, sample: int) -> str:
    return manifest.paths[sample] if manifest.paths else str(sample)


def label(manifest: Manifest, sample: int) -> tuple[int, str] | tuple[None, None]:
    """The number and the name of an image's class."""
    number = int(manifest.labels[sample])
    return (number, manifest.classes[number]) if number >= 0 else (None, None)


@contextmanager
def table_writer(file: BinaryIO, delimiter: str) -> Iterator[Any]:
    """A csv.writer to a binary file. Names that are not UTF-8 keep their bytes."""
    text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
    yield csv.writer(text, delimiter=delimiter, lineterminator="\n")
    text.detach()  # this flushes the text and leaves the file open


def write_csv(file: BinaryIO, blocks: Iterator[Block], manifest: Manifest) -> None:
    """The first columns are those of lightly-train, whose files have no labels."""
    more = ("label", "class") if manifest.classes else ()
    with table_writer(file, ",") as table:
        for number, (ids, features) in enumerate(blocks):
            if number == 0:
                dim = features.shape[1]
                table.writerow(["filename", *(f"embedding_{i}" for i in range(dim)), *more])
            for sample, row in zip(ids.tolist(), features.tolist(), strict=True):
                # 9 digits are enough to get the same float32 back.
                labels = label(manifest, sample) if more else ()
                table.writerow([filename(manifest, sample), *map("{:.9g}".format, row), *labels])


def write_array(file: BinaryIO, blocks: Iterator[Block]) -> np.ndarray:
    """Write features to a .npy file. Returns the sample ids of the rows `(N,)`.

    The number of rows is only known at the end. numpy leaves room for it in the header.
    """
    ids: list[np.ndarray] = []
    for own, features in blocks:
        if not ids:
            file.write(npy_header("<f4", (0, features.shape[1])))
        file.write(features.astype("<f4", copy=False).data)
        ids.append(own)
    file.seek(0)
    file.write(npy_header("<f4", (sum(map(len, ids)), features.shape[1])))
    file.seek(0, os.SEEK_END)
    return np.concatenate(ids)


def npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    fields = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def write_npy(file: BinaryIO, blocks: Iterator[Block], manifest: Manifest) -> None:
    write_array(file, blocks)


def write_names(file: BinaryIO, ids: np.ndarray, manifest: Manifest) -> None:
    with table_writer(file, "\t") as table:
        table.writerow(["filename", "label", "class"])
        for sample in ids:
            table.writerow([filename(manifest, sample), *label(manifest, sample)])


def write_npz(file: BinaryIO, blocks: Iterator[Block], manifest: Manifest) -> None:
    with TemporaryFile(dir=Path(file.name).parent) as features, ZipFile(file, "w") as archive:
        ids = write_array(features, blocks)
        features.seek(0)
        with archive.open("features.npy", "w", force_zip64=True) as entry:
            shutil.copyfileobj(features, entry, 2**20)
        for name, array in (
            ("labels", manifest.labels[ids]),
            ("classes", np.array(manifest.classes, np.str_)),
        ):
            with archive.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
        # A million names take much more memory as a NumPy array than in the manifest.
        descr = f"<U{max(len(filename(manifest, sample)) for sample in ids)}"
        with archive.open("filenames.npy", "w", force_zip64=True) as entry:
            entry.write(npy_header(descr, ids.shape))
            for first in range(0, len(ids), CHUNK):
                names = [filename(manifest, sample) for sample in ids[first : first + CHUNK]]
                entry.write(np.array(names, descr).tobytes())


def write_parquet(file: BinaryIO, blocks: Iterator[Block], manifest: Manifest) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    try:
        for ids, features in blocks:
            embedding = pa.FixedSizeListArray.from_arrays(features.ravel(), features.shape[1])
            labels = [label(manifest, sample) for sample in ids]
            table = pa.table(
                {
                    "filename": pa.array([valid(filename(manifest, i)) for i in ids], pa.string()),
                    "label": pa.array([number for number, _ in labels], pa.int64()),
                    "class": pa.array([name and valid(name) for _, name in labels], pa.string()),
                    "embedding": embedding,
                }
            )
            writer = writer or pq.ParquetWriter(file, table.schema)
            writer.write_table(table)
    finally:
        if writer:
            writer.close()


def valid(name: str) -> str:
    """A name as UTF-8, the only text in Parquet. All other bytes become question marks."""
    return os.fsencode(name).decode("utf-8", "replace")


WRITERS: dict[str, Write] = {
    ".npz": write_npz,
    ".npy": write_npy,
    ".parquet": write_parquet,
    ".csv": write_csv,
}


@dataclass(frozen=True)
class Embeddings:
    """The content of a file of `embed`, with the result that `embed` wrote beside it."""

    features: np.ndarray  # (N, D) float32
    labels: np.ndarray  # (N,) int64, and -1 for an image without a class
    filenames: Sequence[str]
    classes: tuple[str, ...]
    result: dict[str, Any]


def read_embeddings(path: str | Path) -> Embeddings:
    """The content of a file that `embed` wrote. The features of a .npy file stay on the disk.

    Raises FileNotFoundError if this file or one that belongs to it is missing, and ValueError for
    an unknown format.
    """
    path = Path(path)
    writer_of(path)  # raises ValueError for other formats, and for .parquet without its library
    for needed in (path, beside(path, ".json")):
        if not needed.is_file():
            raise FileNotFoundError(f"no {needed}: rsa-fast embed writes it with {path.name}")
    result = json.loads(beside(path, ".json").read_text())
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            filenames, classes = arrays["filenames"].tolist(), tuple(arrays["classes"].tolist())
            return Embeddings(arrays["features"], arrays["labels"], filenames, classes, result)
    names: Sequence[Sequence[Any]]  # filename, label, class of each row
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        flat = table["embedding"].combine_chunks().flatten()
        features = flat.to_numpy().reshape(len(table), -1)
        columns = (table[name].to_pylist() for name in ("filename", "label", "class"))
        names = list(zip(*columns, strict=True))
    elif path.suffix == ".npy":
        features = np.load(path, mmap_mode="r")
        names = read_table(beside(path, ".tsv"), "\t")
    else:
        rows = read_table(path, ",")
        dim = result["dim"]
        features = np.array([row[1 : dim + 1] for row in rows], np.float32)
        names = [[row[0], *(row[dim + 1 :] or (None, None))] for row in rows]
    filenames = [name for name, _, _ in names]
    labels = np.array([-1 if number in (None, "") else int(number) for _, number, _ in names])
    name_of = {int(number): name for _, number, name in names if number not in (None, "")}
    classes = tuple(name_of.get(i, str(i)) for i in range(max(name_of, default=-1) + 1))
    return Embeddings(features, labels, filenames, classes, result)


def read_table(path: Path, delimiter: str) -> list[list[str]]:
    """The rows of a csv file without the header."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.reader(file, delimiter=delimiter))[1:]
