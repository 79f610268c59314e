from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsa_fast.pipelines.layouts import open_source
from rsa_fast.pipelines.packed import ENTRY
from rsa_fast.pipelines.shards import (
    ShardWriter,
    open_shards,
    shard_path,
    shard_source,
    stored_label,
)
from rsa_fast.pipelines.sources import to_rgb
from tests.helpers import NO_DALI, ROOT, encoded, natural_image

COUNT = 23
SHARD_BYTES = 40_000


def jpegs() -> list[bytes]:
    return [encoded(natural_image(i, 40 + i, 60 - i), quality=90 - i) for i in range(COUNT)]


def label(sample: int) -> int:
    return 7 * sample  # The labels have one to three digits.


def write(folder: Path, done: np.ndarray | None = None) -> np.ndarray:
    entries = np.zeros(COUNT, ENTRY)
    done = entries[:0] if done is None else done
    entries[: len(done)] = done
    writer = ShardWriter(folder, SHARD_BYTES, done)
    for i, data in list(enumerate(jpegs()))[len(done) :]:
        entries[i] = (*writer.append(data, label(i)), len(data), label(i), 40 + i, 60 - i, False)
    writer.finish(entries)
    writer.close()
    return entries


@pytest.fixture
def data(tmp_path) -> Path:
    write(tmp_path / "train")
    description = {
        "format": "shards",
        "version": 1,
        "count": COUNT,
        "classes": [str(i) for i in range(7 * COUNT)],
    }
    (tmp_path / "train.json").write_text(json.dumps(description))
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_images_and_labels_come_back(data):
    for source in (shard_source(data / "train", "pretrain"), open_source(data, "train")):
        manifest = source.manifest
        assert (
            manifest.labels.tolist() == [label(i) for i in range(COUNT)]
            and len(manifest.classes) == 7 * COUNT
        )
        assert manifest.sizes.tolist() == [[40 + i, 60 - i] for i in range(COUNT)]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(source.encoded, [*range(COUNT)] * 5)) == jpegs() * 5
        assert all(
            (source.read(i) == to_rgb(Image.open(io.BytesIO(data)))).all()
            for i, data in enumerate(jpegs())
        )
    packed = open_shards(data / "train")
    assert [stored_label(packed, i) for i in range(COUNT)] == manifest.labels.tolist()


def test_the_shards_are_plain_tar_files_of_bounded_size(data):
    shards = sorted((data / "train").glob("shard-*.tar"))
    assert len(shards) > 2 and all(path.stat().st_size <= SHARD_BYTES for path in shards)
    members = []
    for path in shards:
        with tarfile.open(path) as tar:
            members += [(member.name, tar.extractfile(member).read()) for member in tar]
    wanted = [
        ((f"{i:08}.jpg", image), (f"{i:08}.cls", str(label(i)).encode()))
        for i, image in enumerate(jpegs())
    ]
    assert members == [member for pair in wanted for member in pair]


def test_a_sample_larger_than_a_shard_has_one_of_its_own(tmp_path):
    writer = ShardWriter(tmp_path / "train", 20_000, np.zeros(0, ENTRY))
    assert [writer.append(bytes(size), 0)[0] for size in (100, 50_000, 100, 100)] == [0, 1, 2, 2]


def test_the_indices_are_those_of_wds2idx(data, tmp_path):
    wds2idx = pytest.importorskip("wds2idx", reason=NO_DALI)
    for shard in (data / "train").glob("shard-*.tar"):
        creator = wds2idx.IndexCreator(str(shard), str(tmp_path / "theirs.idx"), verbose=False)
        creator.create_index()
        creator.close()
        assert shard.with_suffix(".idx").read_text() == (tmp_path / "theirs.idx").read_text()


def test_dali_reads_the_shards(data):
    pytest.importorskip("nvidia.dali", reason=NO_DALI)
    from nvidia.dali import fn, pipeline_def

    shards = sorted(map(str, (data / "train").glob("shard-*.tar")))
    indices = [path.replace(".tar", ".idx") for path in shards]

    @pipeline_def(batch_size=COUNT, num_threads=1, device_id=None)
    def graph():
        return tuple(
            fn.readers.webdataset(
                paths=shards,
                index_paths=indices,
                ext=["jpg", "cls"],
                missing_component_behavior="error",
            )
        )

    pipeline = graph()
    pipeline.build()
    images, labels = pipeline.run()
    assert [np.asarray(image).tobytes() for image in images] == jpegs()
    assert [int(np.asarray(text).tobytes()) for text in labels] == [label(i) for i in range(COUNT)]


@pytest.mark.parametrize("done", [1, 5, 12, COUNT])
def test_a_writer_goes_on_behind_what_is_known_written(data, tmp_path, done):
    wanted = contents(data / "train")
    entries = write(tmp_path / "again")
    shard = int(entries["file"][done - 1])
    with shard_path(tmp_path / "again", shard).open("ab") as file:
        file.write(b"left by a kill" * 100)
    shard_path(tmp_path / "again", shard + 9).write_bytes(b"of a longer run")
    write(tmp_path / "again", entries[:done])
    assert contents(tmp_path / "again") == wanted
    shard_path(tmp_path / "again", shard).write_bytes(b"short")
    with pytest.raises(ValueError, match="shorter than its journal: restart"):
        ShardWriter(tmp_path / "again", SHARD_BYTES, entries[:done])


def test_damaged_and_missing_files_are_named(data):
    last = sorted((data / "train").glob("*.tar"))[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(
        ValueError, match=rf"{last.name} is truncated: it has [\d,]+ bytes, but its images end at"
    ):
        shard_source(data / "train", "train")
    last.unlink()
    with pytest.raises(FileNotFoundError, match=last.name):
        shard_source(data / "train", "train")
    last.write_bytes(whole)
    source = shard_source(data / "train", "train")
    entry = open_shards(data / "train").entries[COUNT - 1]
    last.write_bytes(whole.replace(jpegs()[-1], bytes(entry["size"])))
    with pytest.raises(ValueError, match=rf"cannot decode image {COUNT - 1} of .*{last.name}"):
        source.read(COUNT - 1)
    (data / "train.json").write_text("{}")
    with pytest.raises(ValueError, match=r"train\.json does not describe the images"):
        shard_source(data / "train", "train")
    (data / "train" / "index.npz").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"index\.npz is not a valid index"):
        shard_source(data / "train", "train")
    (data / "train" / "index.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*index\.npz: rsa-fast convert index"):
        shard_source(data / "train", "train")


def test_val_shards_are_the_test_split_and_two_forms_of_a_split_are_refused(data):
    (data / "train").rename(data / "val")
    (data / "train.json").rename(data / "val.json")
    assert len(open_source(data, "test").manifest) == COUNT
    (data / "val.beton").write_bytes(b"")
    with pytest.raises(ValueError, match=r"contains val, val\.beton for one split: keep one"):
        open_source(data, "test")


def test_a_million_samples_open_fast_and_lean(tmp_path):
    count, per_shard = 1_281_167, 9000
    entries = np.zeros(count, ENTRY)
    entries["size"], entries["height"], entries["width"], entries["label"] = (
        110_000,
        375,
        500,
        np.arange(count) % 1000,
    )
    entries["file"], entries["offset"] = (
        np.arange(count) // per_shard,
        np.arange(count) % per_shard * 111_616,
    )
    (tmp_path / "train").mkdir()
    for shard in range(entries["file"][-1] + 1):
        with shard_path(tmp_path / "train", shard).open("wb") as file:
            file.truncate(per_shard * 111_616)
    columns = {name: entries[name] for name in ("offset", "size", "label", "height", "width")}
    np.savez(tmp_path / "train" / "index.npz", shard=entries["file"], **columns)
    description = {
        "format": "shards",
        "version": 1,
        "count": count,
        "classes": [str(i) for i in range(1000)],
    }
    (tmp_path / "train.json").write_text(json.dumps(description))
    began = time.process_time()  # of this process: others may be at work on the machine
    shard_source(tmp_path / "train", "train")
    assert time.process_time() - began < 2
    tracemalloc.start()
    source = shard_source(tmp_path / "train", "train")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400e6 and len(source.manifest) == count


MANY = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from rsa_fast.pipelines.packed import free_descriptors
from rsa_fast.pipelines.shards import shard_source

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
sources = [shard_source(Path(sys.argv[1]), split) for split in ("pretrain", "train", "test")]
assert free_descriptors() > 10
wanted = [bytes([i]) * (i + 1) for i in range(100)]
for source in sources:
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.encoded, [*range(100)] * 3)) == wanted * 3
print(free_descriptors())
"""


@pytest.fixture
def many(tmp_path) -> Path:
    """A hundred shards of one sample, whose content is not an image."""
    writer = ShardWriter(tmp_path / "train", 1, np.zeros(0, ENTRY))
    entries = np.zeros(100, ENTRY)
    for i in range(100):
        data = bytes([i]) * (i + 1)
        entries[i] = (*writer.append(data, 0), len(data), 0, 20, 20, False)
    writer.finish(entries)
    writer.close()
    description = {"format": "shards", "version": 1, "count": 100, "classes": ["a"]}
    (tmp_path / "train.json").write_text(json.dumps(description))
    return tmp_path / "train"


def test_many_shards_leave_descriptors_free(many):
    done = subprocess.run(
        [sys.executable, "-c", MANY, str(many)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


def test_few_shards_stay_open_and_a_reopened_one_must_be_the_same(many, monkeypatch):
    packed = open_shards(many)
    for i in range(100):
        packed.stored(i)
    assert packed.opened.cache_info().misses == 100
    monkeypatch.setattr("rsa_fast.pipelines.packed.free_descriptors", lambda: 8)
    packed = open_shards(many)
    assert packed.stored(99) == bytes([99]) * 100 and packed.stored(0) == b"\0"
    shard_path(many, 50).write_bytes(bytes(20_000))
    with pytest.raises(ValueError, match=r"shard-000050\.tar was changed or replaced after"):
        packed.stored(50)
    assert packed.stored(51) == bytes([51]) * 52
