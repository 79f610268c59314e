from __future__ import annotations

import io
import json
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rsa_fast.pipelines import beton
from rsa_fast.pipelines.beton import BetonWriter, beton_source, page_bytes
from rsa_fast.pipelines.layouts import open_source
from rsa_fast.pipelines.packed import ENTRY
from rsa_fast.pipelines.sources import to_rgb
from tests.helpers import NO_FFCV, natural_image

PAGE = 2**21  # the smallest that FFCV allows
# As pixels, these images fill three pages.
SIZES = [(480, 500), (300, 400), (500, 480), (20, 31), (490, 490), (480, 500), (33, 17)]


def images() -> list[np.ndarray]:
    return [natural_image(seed, *size) for seed, size in enumerate(SIZES)]


def write(path: Path, pixels: list[np.ndarray], done: int = 0) -> np.ndarray:
    """Write images as pixels with labels 0, 1, 2, 0, ...

    The first `done` images are in the file already.
    """
    entries = np.zeros(len(pixels), ENTRY)
    where = np.load(path.with_suffix(".npy")) if done else entries
    entries[:done] = where[:done]
    writer = BetonWriter(path, len(pixels), PAGE, entries[:done])
    for i in range(done, len(pixels)):
        height, width = pixels[i].shape[:2]
        data = pixels[i].tobytes()
        entries[i] = (*writer.append(data, i % 3), len(data), i % 3, height, width, True)
    writer.finish(entries)
    writer.close()
    np.save(path.with_suffix(".npy"), entries)
    return entries


@pytest.fixture
def written(tmp_path) -> Path:
    write(tmp_path / "train.beton", images())
    return tmp_path / "train.beton"


def ffcv_writes(path: Path, pixels: list[np.ndarray], workers: int, **field: object) -> Path:
    pytest.importorskip("ffcv", reason=NO_FFCV)
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    dataset = [(image, i % 3) for i, image in enumerate(pixels)]
    writer = DatasetWriter(
        str(path), {"image": RGBImageField(**field), "label": IntField()}, PAGE, workers
    )
    writer.from_indexed_dataset(dataset, chunksize=1)
    return path


# Further fields of FFCV, each with the value for an image of the index i.
FURTHER = {
    "index": lambda fields: (fields.IntField(), lambda i: i),
    "score": lambda fields: (fields.FloatField(), lambda i: i / 2),
    "thumbnail": lambda fields: (
        fields.RGBImageField(write_mode="raw"),
        lambda i: natural_image(i, 8, 9),
    ),
    "empty": lambda fields: (fields.BytesField(), lambda i: np.zeros(0, np.uint8)),
    "caption": lambda fields: (fields.BytesField(), lambda i: np.full(i + 1, i, np.uint8)),
    "meta": lambda fields: (fields.JSONField(), lambda i: {"i": i}),
    "box": lambda fields: (
        fields.NDArrayField(np.dtype("<f4"), (4,)),
        lambda i: np.full(4, i, "<f4"),
    ),
    "mask": lambda fields: (
        fields.TorchTensorField(torch.float32, (2, 2)),
        lambda i: torch.full((2, 2), float(i)),
    ),
}


def ffcv_writes_fields(path: Path, order: tuple[str, ...], labels: list[int]) -> Path:
    """Write `images()` with FFCV and the fields `order`.

    A field that is not in `FURTHER` is an image if its name says so, and otherwise the labels.
    """
    fields = pytest.importorskip("ffcv.fields", reason=NO_FFCV)
    from ffcv.writer import DatasetWriter

    types, values = {}, {}
    for name in order:
        if name in FURTHER:
            types[name], values[name] = FURTHER[name](fields)
        elif "image" in name:
            types[name], values[name] = fields.RGBImageField(write_mode="raw"), images().__getitem__
        else:
            types[name], values[name] = fields.IntField(), labels.__getitem__
    dataset = [tuple(values[name](i) for name in order) for i in range(len(SIZES))]
    DatasetWriter(str(path), types, PAGE, 1).from_indexed_dataset(dataset, chunksize=1)
    return path


LABELS = [2, 0, 1, 0, 2, 1, 0]


@pytest.mark.parametrize(
    ("order", "labels"),
    [
        (("image", "label", *FURTHER), LABELS),
        ((*FURTHER, "label", "image"), LABELS),  # The image is not the first RGB field.
        (("the_image", "index", "thumbnail", "Target"), LABELS),
        (("image", "index", "species"), LABELS),  # There is no other int field.
        (("image", "species", "genus"), [-1] * 7),  # Either may be the label.
        (("image", "index"), [-1] * 7),
        (("image", "meta"), [-1] * 7),
    ],
)
def test_further_fields_are_skipped_and_the_choice_is_said(tmp_path, caplog, order, labels):
    path = ffcv_writes_fields(tmp_path / "train.beton", order, LABELS)
    with caplog.at_level("INFO", "rsa_fast"):
        source = beton_source(path)
        beton_source(path)
    assert source.manifest.labels.tolist() == labels
    assert all((source.read(i) == wanted).all() for i, wanted in enumerate(images()))
    (line,) = caplog.messages
    image = next(name for name in order if "image" in name)
    label = next((name for name in order if name in ("label", "Target", "species")), "")
    label = label if labels == LABELS else ""
    assert f"the images are in field {image}, " in line
    assert (f"the labels in field {label}" if label else "there are no labels") in line
    unread = [name for name in order if name not in (image, label)]
    assert not unread or line.endswith(f"; fields not read: {', '.join(unread)}")


def test_numbers_that_are_no_classes_are_no_labels(tmp_path):
    stamps = [1_700_000_000 + i for i in (3, 1, 2, 3, 5, 0, 0)]
    path = ffcv_writes_fields(tmp_path / "train.beton", ("image", "taken_at"), stamps)
    assert beton_source(path).manifest.labels.tolist() == [-1] * 7


def test_the_types_are_ffcv_s():
    types = pytest.importorskip("ffcv.types", reason=NO_FFCV)
    from ffcv.fields import IntField, RGBImageField

    record = np.dtype([("image", beton.IMAGE), ("label", beton.FIELD_TYPES[1])], align=True)
    theirs = types.get_metadata_type([RGBImageField(), IntField()])
    for number, handler in types.TYPE_ID_HANDLER.items():
        if handler:
            assert beton.FIELD_TYPES[number] == handler.metadata_type.fget(None)
    pairs = [
        (beton.HEADER, types.HeaderType),
        (beton.ALLOCATION, types.ALLOC_TABLE_TYPE),
        (record, theirs),
    ]
    for ours, theirs in pairs:
        assert ours.itemsize == theirs.itemsize
        assert [ours.fields[n][1] for n in ours.names] == [
            theirs.fields[n][1] for n in theirs.names
        ]
    assert (
        beton.FIELD.itemsize == types.FieldDescType.itemsize
        and beton.VERSION == types.CURRENT_VERSION
    )


def test_pixels_labels_and_sizes_come_back(written):
    source = beton_source(written)
    assert source.manifest.sizes.tolist() == [list(size) for size in SIZES]
    assert source.manifest.labels.tolist() == [0, 1, 2, 0, 1, 2, 0] and source.manifest.classes == (
        "0",
        "1",
        "2",
    )
    with ThreadPoolExecutor(4) as pool:
        for wanted, found in zip(
            images() * 5, pool.map(source.read, [*range(len(SIZES))] * 5), strict=True
        ):
            assert found.flags.writeable and (found == wanted).all()
    assert source.encoded is None  # Stored pixels have no encoded file.


def test_the_file_is_the_one_ffcv_writes_with_one_worker(written, tmp_path):
    theirs = ffcv_writes(tmp_path / "their.beton", images(), 1, write_mode="raw")
    assert theirs.read_bytes() == written.read_bytes()


def test_ffcv_reads_the_file(written):
    reader = pytest.importorskip("ffcv.reader", reason=NO_FFCV).Reader(str(written))
    assert (
        reader.field_names == ["image", "label"]
        and reader.num_samples == len(SIZES)
        and reader.page_size == PAGE
    )
    sizes = dict(
        zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True)
    )
    stored = np.fromfile(written, np.uint8)
    for (image, _), wanted in zip(reader.metadata, images(), strict=True):
        start = int(image["data_ptr"])
        assert (stored[start : start + sizes[start]] == wanted.reshape(-1)).all() and image[
            "height"
        ] == wanted.shape[0]
        assert start // PAGE == (start + wanted.size - 1) // PAGE  # No image crosses a page.
    assert reader.metadata["f1"].tolist() == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("mode", ["jpg", "proportion"])
def test_ffcv_s_own_files_are_read(tmp_path, mode):
    path = ffcv_writes(tmp_path / "their.ffcv", images(), 2, write_mode=mode, jpeg_quality=90)
    from ffcv.fields.rgb_image import encode_jpeg

    source, packed = beton_source(path), beton.open_beton(path)
    assert source.manifest.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    for i, wanted in enumerate(images()):
        as_jpeg = encode_jpeg(wanted, 90).tobytes()
        assert packed.stored(i) == (wanted.tobytes() if packed.entries["raw"][i] else as_jpeg)
        assert (
            source.read(i)
            == (wanted if packed.entries["raw"][i] else to_rgb(Image.open(io.BytesIO(as_jpeg))))
        ).all()
    if mode == "jpg":
        assert source.encoded(3) == encode_jpeg(images()[3], 90).tobytes()


@pytest.mark.parametrize("done", [1, 3, 6, 7])
def test_a_writer_goes_on_behind_what_is_known_written(written, done):
    wanted = written.read_bytes()
    entries = np.load(written.with_suffix(".npy"))
    end = int(entries["offset"][done - 1] + entries["size"][done - 1])
    written.write_bytes(wanted[:end] + b"left by a kill" * 1000)
    write(written, images(), done)
    assert written.read_bytes() == wanted
    written.write_bytes(wanted[: end - 1])
    with pytest.raises(ValueError, match="shorter than its journal: restart"):
        write(written, images(), done)


def test_damaged_and_foreign_files_are_named(written):
    whole = written.read_bytes()
    header = np.frombuffer(whole, beton.HEADER, 1)[0]

    def fails_with(content: bytes, message: str) -> None:
        written.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"cannot read .*train\.beton as FFCV's format: .*{message}"
        ):
            beton_source(written)

    def changed(**values: int) -> bytes:
        new = header.copy()
        for name, value in values.items():
            new[name] = value
        return new.tobytes() + whole[beton.HEADER.itemsize :]

    fails_with(b"", "truncated: 0 of 1 records")
    fails_with(b"not a beton file, but longer than a header", "version 28526, this code reads 2")
    fails_with(changed(version=3), "version 3, this code reads 2")
    fails_with(changed(allocations_ptr=0), "the file is truncated or was never finished")
    fails_with(changed(count=10**9), "truncated: ")
    fails_with(whole[:1000], "truncated: 0 of 2 records")
    fails_with(whole[:2110], "truncated: 0 of 7 records")
    fails_with(whole[:-1], "1 of 7 images are not in its allocation table")
    fails_with(whole[: len(whole) // 2], "the allocation table is missing: the file is truncated")
    fails_with(
        whole.replace(b"\x02image", b"\x01image"),
        r"none of its fields \(image, label\) is an RGBImageField",
    )
    fails_with(
        whole.replace(b"\x01label", b"\xfflabel"), r"fields of custom types .*: label \(255\)"
    )
    fails_with(whole.replace(b"\x01label", b"\x05label"), "images are not in its allocation table")
    with pytest.raises(FileNotFoundError):
        beton_source(written.with_name("absent.beton"))


def test_the_fingerprint_is_of_the_content_not_of_the_place(written, tmp_path):
    first = beton_source(written).manifest.fingerprint
    assert beton_source(written.rename(tmp_path / "moved.beton")).manifest.fingerprint == first
    other = images()
    other[2] = other[2][:-1]
    write(tmp_path / "train.beton", other)
    assert beton_source(tmp_path / "train.beton").manifest.fingerprint != first


def test_class_names_come_from_the_file_beside_it(written):
    description = {"format": "beton", "version": 1, "count": 7, "classes": ["ant", "bee", "cat"]}
    written.with_suffix(".json").write_text(json.dumps(description))
    assert beton_source(written).manifest.classes == ("ant", "bee", "cat")
    for wrong in (
        {**description, "count": 8},
        {**description, "format": "shards"},
        {**description, "version": 9},
        [],
    ):
        written.with_suffix(".json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"train\.json does not describe the images beside it"):
            beton_source(written)


def test_pages_hold_the_largest_image(tmp_path):
    assert [page_bytes(n) for n in (1, 2**23, 2**23 + 1, 2400 * 1632 * 3)] == [
        2**23,
        2**23,
        2**24,
        2**24,
    ]
    with pytest.raises(
        ValueError, match=r"an image of 2,097,153 bytes does not fit a page of 2,097,152"
    ):
        BetonWriter(tmp_path / "a", 1, PAGE, np.zeros(0, ENTRY)).append(bytes(PAGE + 1), 0)


def test_a_folder_of_beton_files_is_a_source(written):
    data = written.parent
    assert (open_source(data, "pretrain").read(1) == images()[1]).all() and open_source(
        data, "train"
    ).manifest.split == "train"
    with pytest.raises(FileNotFoundError, match="no val/ or test/ folder"):
        open_source(data, "test")
    write(data / "val_500_0.5_90.ffcv", images()[:2])
    assert len(open_source(data, "test").manifest) == 2
    write(data / "train_400.ffcv", images()[:2])
    with pytest.raises(
        ValueError, match=r"contains train\.beton, train_400\.ffcv for one split: keep one"
    ):
        open_source(data, "pretrain")


def test_a_million_images_open_fast_and_lean(tmp_path):
    count = 1_281_167
    entries = np.zeros(count, ENTRY)
    entries["size"], entries["label"], entries["height"], entries["width"] = (
        110_000,
        np.arange(count) % 1000,
        375,
        500,
    )
    path = tmp_path / "train.beton"
    writer = BetonWriter(path, count, 2**23, np.zeros(0, ENTRY))
    entries["offset"] = writer.end + 110_000 * np.arange(count)
    writer.end += -(-110_000 * count // 2**23) * 2**23
    writer.file.seek(writer.end)  # This leaves a hole: no byte of an image is on the disk.
    writer.finish(entries)
    writer.close()
    began = time.process_time()  # of this process: others may be at work on the machine
    beton_source(path)
    assert time.process_time() - began < 2
    tracemalloc.start()
    source = beton_source(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400e6 and len(source.manifest) == count
