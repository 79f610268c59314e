"""Malicious files are refused with a clear error before a pixel is used.

They run no code and do not exhaust the memory.
"""

from __future__ import annotations

import io
import json
import tracemalloc
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from rsa_fast.pipelines import beton
from rsa_fast.pipelines.beton import BetonWriter, beton_source
from rsa_fast.pipelines.layouts import open_source
from rsa_fast.pipelines.manifest import MAX_PIXELS, Manifest, Paths
from rsa_fast.pipelines.npz import read_npz
from rsa_fast.pipelines.packed import ENTRY, read_classes
from rsa_fast.pipelines.scan import read_cache
from rsa_fast.pipelines.shards import INDEX, ShardWriter, shard_source
from tests.helpers import Exploit, jpeg, natural_image, write_folder

COUNT = 6
quick = settings(
    deadline=None, max_examples=150, suppress_health_check=list(HealthCheck), derandomize=True
)


@contextmanager
def little_memory(megabytes: float = 8):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 1e6
    finally:
        tracemalloc.stop()


def mutations(length: int):
    """Draw the bytes to overwrite, by position, and the length that is left of the file."""
    changes = st.dictionaries(st.integers(0, length - 1), st.integers(0, 255), max_size=8)
    return st.tuples(changes, st.one_of(st.just(length), st.integers(0, length)))


def mutated(content: bytes, mutation: tuple[dict[int, int], int]) -> bytes:
    changed = bytearray(content)
    for position, value in mutation[0].items():
        changed[position] = value
    return bytes(changed[: mutation[1]])


# --- images


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path):
    write_folder(tmp_path, {"train": 2})
    content = jpeg(0)
    at = content.index(b"\xff\xc0") + 5
    (tmp_path / "train" / "class_0" / "bomb.jpg").write_bytes(
        content[:at] + b"\xff" * 4 + content[at + 4 :]
    )
    with (
        little_memory(),
        pytest.raises(
            ValueError, match=r"class_0/bomb\.jpg: .*4294836225 pixels\) exceeds .* of 178956970"
        ),
    ):
        open_source(tmp_path, "pretrain")
    assert MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


# --- the manifest and its cache


def manifest(**fields) -> Manifest:
    whole = {
        "labels": np.zeros(2, np.int64),
        "sizes": np.full((2, 2), 9, np.int32),
        "paths": Paths(["a.jpg", "b/c.jpg"]),
    }
    return Manifest("train", ("x", "y"), fingerprint="", **{**whole, **fields})


@pytest.mark.parametrize(
    "path", ["../x.jpg", "a/../../x.jpg", "a/..", "..", "/etc/passwd", "", "a//b.jpg"]
)
def test_paths_that_lead_out_of_the_data_are_refused(path):
    manifest(paths=Paths(["a..b/..c.jpg", "d/e../...jpg"]))
    for paths in ([path, "b.jpg"], ["b.jpg", path]):
        with pytest.raises(ValueError, match="only images below the data folder are read"):
            manifest(paths=Paths(paths))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": np.array(0)}, r"\(\) labels"),
        ({"labels": np.zeros(3, np.int64)}, r"\(3,\) labels, \(2, 2\) sizes and 2 paths"),
        ({"sizes": np.full((2, 3), 9, np.int32)}, r"\(2, 3\) sizes"),
        ({"paths": Paths(["a.jpg"])}, "and 1 paths"),
        ({"labels": np.array([0, 2])}, "labels up to 2 of 2 classes"),
        ({"labels": np.array([0, -2])}, "labels"),
        (
            {"sizes": np.array([[9, 9], [0, 9]], np.int32)},
            r"image b/c\.jpg is \[0, 9\] px: images of 1 to 178,956,970 pixels",
        ),
        (
            {"sizes": np.array([[2**16, 2**16], [9, 9]], np.int32)},
            r"image a\.jpg is \[65536, 65536\] px",
        ),
    ],
)
def test_a_manifest_that_does_not_fit_together_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        manifest(**fields)


def write_cache(place: Path, **changes) -> None:
    meta = {"state": "s", "classes": ["x", "y"], "fingerprint": "f", "bad": {}}
    columns = {
        "labels": np.array([0, 1, 1]),
        "sizes": np.full((3, 2), 9, np.int32),
        "orientations": np.ones(3, np.uint8),
        "paths": b"a.jpg\0b.jpg\0c/d.jpg",
    }
    columns |= {"meta": json.dumps(meta).encode()} | changes
    np.savez(
        place,
        **{
            k: np.frombuffer(v, np.uint8) if isinstance(v, bytes) else v for k, v in columns.items()
        },
    )


def test_a_cache_that_no_scan_wrote_is_refused_by_name(tmp_path):
    place = tmp_path / "train.npz"
    write_cache(place)
    found = read_cache([place], "train", "s").manifest
    assert list(found.paths) == ["a.jpg", "b.jpg", "c/d.jpg"] and found.labels.tolist() == [0, 1, 1]
    assert read_cache([place], "train", "of other files") is None
    for changes in (
        {"paths": b"a.jpg\0b.jpg\0../d.jpg"},
        {"labels": np.array([0, 1])},
        {"sizes": np.zeros((3, 2), np.int32)},
        {"orientations": np.ones(2, np.uint8)},
    ):
        write_cache(place, **changes)
        with pytest.raises(
            ValueError, match=r"train\.npz was not written by this program: .*\. Delete it"
        ):
            read_cache([place], "train", "s")


def test_a_table_of_tiny_imagenet_cannot_lead_out_of_the_data(tmp_path):
    write_folder(tmp_path / "data", {"train": 1})
    (tmp_path / "data" / "val" / "images").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(jpeg(0))
    (tmp_path / "data" / "val" / "val_annotations.txt").write_text("../../../secret.jpg\tclass_0\n")
    with pytest.raises(FileNotFoundError, match="no images in"):
        open_source(tmp_path / "data", "test")
    # Where the folder has an image of that name, this one is meant.
    (tmp_path / "data" / "val" / "images" / "secret.jpg").write_bytes(jpeg(1))
    source = open_source(tmp_path / "data", "test")
    assert list(source.manifest.paths) == ["val/images/secret.jpg"]


def test_arrays_that_would_run_code_or_fill_the_memory_are_refused(tmp_path):
    place, wanted = tmp_path / "a.npz", {"a": np.dtype("<i8")}
    np.savez(place, a=np.arange(5))
    assert (
        read_npz(place, wanted)["a"].tolist() == [0, 1, 2, 3, 4]
        and read_npz(place, wanted)["a"].flags.writeable
    )

    def refused(message: str) -> None:
        with (
            little_memory(),
            pytest.raises(ValueError, match=rf"a\.npz cannot be read: .*{message}"),
        ):
            read_npz(place, wanted)

    np.savez(place, a=np.array([Exploit(tmp_path / "ran")], object))
    refused("contains object, wanted int64")
    assert not (tmp_path / "ran").exists()
    np.savez_compressed(place, a=np.zeros(10**7, np.int64))
    refused("is compressed or larger than the file")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<i8", "fortran_order": False, "shape": (10**15,)}
    )
    with zipfile.ZipFile(place, "w") as stored:
        stored.writestr("a.npy", header.getvalue() + bytes(8))
    refused("cannot reshape array of size 1")
    np.savez(place, b=np.arange(5))
    refused("no item named 'a.npy'")
    place.write_bytes(b"no zip")
    refused("not a zip file")
    with pytest.raises(FileNotFoundError):
        read_npz(tmp_path / "absent.npz", wanted)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


ANY_ARRAY = st.sampled_from(
    [
        np.zeros(shape, dtype)
        for shape in ((), 0, 2, (2, 2), (1, 2, 3))
        for dtype in ("<i8", "<i4", "|u1", "<f8", "<U3", "V0")
    ]
)
SIDE = st.integers(1, 9) | st.integers(-(2**31), 2**31 - 1)
JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=4), max_leaves=5
)
META = st.fixed_dictionaries(
    {"state": st.just("s"), "classes": JSON | st.just(["x", "y"]), "fingerprint": JSON}
)
NAMES = st.lists(st.text("ab./\0", max_size=6), max_size=4).map("\0".join)


@quick
@given(
    labels=ANY_ARRAY
    | st.lists(st.integers(-2, 3), max_size=3).map(lambda values: np.array(values, np.int64)),
    sizes=ANY_ARRAY
    | st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=3).map(
        lambda pairs: np.array(pairs, np.int32)
    ),
    paths=ANY_ARRAY | NAMES.map(str.encode),
    meta=(JSON | META).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=30),
)
def test_any_arrays_are_a_manifest_or_refused(place, labels, sizes, paths, meta):
    write_cache(place / "train.npz", labels=labels, sizes=sizes, paths=paths, meta=meta)
    with little_memory():
        try:
            found = read_cache([place / "train.npz"], "train", "s")
        except ValueError as error:
            assert "Delete it" in str(error)
            return
    if found is not None:
        assert len(found) == len(found.sizes) and all(
            set(path.split("/")).isdisjoint({"", ".."}) for path in found.paths
        )
        assert (found.sizes > 0).all() and all(isinstance(name, str) for name in found.classes)


def cache_bytes() -> bytes:
    file = io.BytesIO()
    write_cache(file)
    return file.getvalue()


CACHE = cache_bytes()


@quick
@given(
    st.binary(max_size=200) | mutations(len(CACHE)).map(lambda mutation: mutated(CACHE, mutation))
)
def test_any_bytes_are_a_cache_or_none(place, content):
    (place / "bytes.npz").write_bytes(content)
    with little_memory():
        try:
            found = read_cache([place / "bytes.npz"], "train", "s")
        except ValueError as error:
            assert "Delete it" in str(error)
        else:
            assert found is None or len(found.manifest) == 3


# --- .beton files


def write_beton(path: Path, raw: bool = False) -> bytes:
    entries = np.zeros(COUNT, ENTRY)
    writer = BetonWriter(path, COUNT, 4096, entries[:0])
    for i in range(COUNT):
        data = natural_image(i, 20, 20).tobytes() if raw else jpeg(i)
        entries[i] = (*writer.append(data, i % 3), len(data), i % 3, 20, 20, raw)
    writer.finish(entries)
    writer.close()
    return path.read_bytes()


RECORD = np.dtype([("image", beton.IMAGE), ("label", "<i8")], align=True)
METADATA = beton.HEADER.itemsize + 2 * beton.FIELD.itemsize


def tables(content: bytearray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return header, fields, metadata and allocations of `write_beton`'s file, writable."""
    header = np.frombuffer(content, beton.HEADER, 1)
    fields = np.frombuffer(content, beton.FIELD, 2, beton.HEADER.itemsize)
    metadata = np.frombuffer(content, RECORD, COUNT, METADATA)
    return (
        header,
        fields,
        metadata,
        np.frombuffer(content, beton.ALLOCATION, COUNT, int(header["allocations_ptr"][0])),
    )


BETON_FAULTS = {
    "count": (
        lambda h, f, m, a: h.__setitem__("count", 2**63),
        "truncated: .* of 9223372036854775808 records",
    ),
    "fields": (
        lambda h, f, m, a: h.__setitem__("fields", 2**16 - 1),
        "truncated: .* of 65535 records",
    ),
    "table behind the end": (
        lambda h, f, m, a: h.__setitem__("allocations_ptr", 2**63),
        "the allocation table is missing",
    ),
    "data behind the end": (
        lambda h, f, m, a: move(m, a, 2**40),
        "is truncated: .* its images end at 1,099,511",
    ),
    "negative": (lambda h, f, m, a: move(m, a, 2**64 - 8), "image 2 is outside its file"),
    "size": (lambda h, f, m, a: a["size"].__setitem__(2, 2**63 - 1), "is truncated"),
    "negative size": (
        lambda h, f, m, a: a["size"].__setitem__(2, 2**63),
        "image 2 is outside its file",
    ),
    "one on another": (
        lambda h, f, m, a: move(m, a, int(a["ptr"][4]) + 1),
        "images 2 and 4 overlap",
    ),
    "empty": (
        lambda h, f, m, a: m["image"]["height"].__setitem__(2, 0),
        r"image 2 is \[0, 20\] px: images of 1 to",
    ),
    "bomb": (
        lambda h, f, m, a: m["image"][["width", "height"]].__setitem__(2, (65535, 65535)),
        r"image 2 is \[65535, 65535\] px",
    ),
    "label": (
        lambda h, f, m, a: m["label"].__setitem__(2, 2**62),
        "labels up to 4611686018427387904 of 65536 classes",
    ),
}


def move(metadata: np.ndarray, allocations: np.ndarray, to: int) -> None:
    metadata["image"]["data_ptr"][2] = allocations["ptr"][2] = to


@pytest.mark.parametrize("fault", BETON_FAULTS)
def test_a_beton_whose_tables_lead_elsewhere_is_refused(tmp_path, fault):
    content = bytearray(write_beton(tmp_path / "train.beton"))
    change, message = BETON_FAULTS[fault]
    change(*tables(content))
    (tmp_path / "train.beton").write_bytes(content)
    with little_memory(), pytest.raises(ValueError, match=rf"train\.beton .*{message}"):
        beton_source(tmp_path / "train.beton")


def read_all(source) -> None:
    """Check that every image has the size in the manifest, or is refused by name."""
    for sample, size in enumerate(source.manifest.sizes.tolist()):
        try:
            assert list(source.read(sample).shape) == [*size, 3]
        except ValueError as error:
            assert f"image {sample} of " in str(error)


@pytest.fixture(scope="module")
def betons(place) -> Path:
    for form in ("jpeg", "raw"):
        write_beton(place / f"{form}.beton", form == "raw")
    return place


@quick
@given(form=st.sampled_from(["jpeg", "raw"]), data=st.data())
def test_any_bytes_are_a_beton_or_refused(betons, form, data):
    content = (betons / f"{form}.beton").read_bytes()
    tables_end = METADATA + COUNT * RECORD.itemsize
    last = int(np.frombuffer(content, beton.HEADER, 1)["allocations_ptr"][0])
    where = st.sampled_from([*range(tables_end), *range(last, len(content))]) | st.integers(
        0, len(content) - 1
    )
    changes = st.dictionaries(where, st.integers(0, 255), max_size=4)
    cut = st.just(len(content)) | st.integers(0, len(content))
    (betons / "any.beton").write_bytes(mutated(content, data.draw(st.tuples(changes, cut))))
    with little_memory():
        try:
            source = beton_source(betons / "any.beton")
        except ValueError as error:
            assert "any.beton" in str(error)
            return
    read_all(source)


@quick
@given(st.binary(max_size=4000))
def test_noise_is_no_beton(place, content):
    (place / "noise.beton").write_bytes(content)
    with little_memory(), pytest.raises(ValueError, match=r"noise\.beton"):
        beton_source(place / "noise.beton")


# --- tar shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("shards")
    entries = np.zeros(COUNT, ENTRY)
    writer = ShardWriter(data / "train", 22_000, entries[:0])
    for i in range(COUNT):
        image = jpeg(i)
        entries[i] = (*writer.append(image, i % 3), len(image), i % 3, 20, 20, False)
    writer.finish(entries)
    writer.close()
    (data / "train.json").write_text(
        json.dumps({"format": "shards", "version": 1, "count": COUNT, "classes": ["a", "b", "c"]})
    )
    return data


@pytest.fixture
def index(shards) -> dict[str, np.ndarray]:
    """Yield the columns of the index, to be changed. The file is restored after the test."""
    path = shards / "train" / "index.npz"
    content = path.read_bytes()
    with np.load(path) as stored:
        yield {name: stored[name] for name in stored.files}
    path.write_bytes(content)


INDEX_FAULTS = [
    ("offset", -512, "image 2 is outside its file"),
    ("offset", 10**6, r"shard-000000\.tar is truncated"),
    ("offset", 2**63 - 1, r"shard-000000\.tar is truncated"),
    ("size", -1, "image 2 is outside its file"),
    ("size", 2**62, r"shard-000000\.tar is truncated"),
    ("size", 10**4, "images 2 and 3 overlap"),
    ("shard", -1, "image 2 is outside its file"),
    ("height", 0, r"image 2 is \[0, 20\] px"),
    ("width", 2**31 - 1, r"image 2 is \[20, 2147483647\] px"),
    ("label", 2**40, "labels up to 1099511627776 of 3 classes"),
    ("label", 3, "labels up to 3 of 3 classes"),
    ("shard", 2**31 - 1, "2147483648 shards, but 6 images"),
]


@pytest.mark.parametrize(("column", "value", "message"), INDEX_FAULTS)
def test_an_index_that_leads_out_of_its_shards_is_refused(shards, index, column, value, message):
    assert index["shard"].tolist().count(0) > 3  # Image 3 follows image 2.
    index[column][2] = value
    np.savez(shards / "train" / "index.npz", **index)
    with little_memory(), pytest.raises(ValueError, match=message):
        shard_source(shards / "train", "train")


def test_an_index_of_uneven_or_other_columns_is_refused(shards, index):
    for changes in (
        {"size": index["size"][:3]},
        {"size": index["size"].astype("<i4")},
        {"shard": index["shard"][0]},
    ):
        np.savez(shards / "train" / "index.npz", **{**index, **changes})
        with pytest.raises(ValueError, match=r"index\.npz is not a valid index"):
            shard_source(shards / "train", "train")


COLUMN, SAMPLE = st.sampled_from(sorted(INDEX)), st.integers(0, COUNT - 1)
NUMBER = (
    st.integers(-1, 1)
    | st.integers(0, 4000)
    | st.integers(-(2**31), 2**31 - 1)
    | st.integers(-(2**63), 2**63 - 1)
)


@quick
@given(data=st.data(), changes=st.lists(st.tuples(COLUMN, SAMPLE, NUMBER), max_size=3))
def test_any_index_is_valid_or_refused(shards, index, data, changes):
    place = shards / "train" / "index.npz"
    columns = {name: column.astype(object) for name, column in index.items()}
    for column, sample, value in changes:
        columns[column][sample] = value
    np.savez(
        place,
        **{
            name: column.astype(np.int64).astype(index[name].dtype)
            for name, column in columns.items()
        },
    )
    if mutation := data.draw(st.none() | mutations(place.stat().st_size)):
        place.write_bytes(mutated(place.read_bytes(), mutation))
    try:
        with little_memory():
            source = shard_source(shards / "train", "train")
    except (ValueError, FileNotFoundError) as error:
        assert str(shards) in str(error)
    else:
        read_all(source)


@quick
@given(st.binary(max_size=50) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_description_is_valid_or_refused(place, content):
    (place / "train.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.json does not describe the images beside it"):
        read_classes(place / "train.json", "beton", 6)


@pytest.mark.parametrize("classes", [None, "abc", [1, 2], {"a": 1}])
def test_a_description_nests_little_and_holds_names(tmp_path, classes):
    path = tmp_path / "train.json"
    for text in (
        "[" * 100_000,
        json.dumps({"format": "beton", "version": 1, "count": 6, "classes": classes}),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"train\.json does not describe the images beside it"):
            read_classes(path, "beton", 6)
