"""What happens to a batch when an image goes bad during a run.

Either the loading stops and names the image, or the next image replaces it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rsa_fast.pipelines import VIEWS, Loading, Order, open_source, open_views
from rsa_fast.pipelines.beton import BetonWriter, open_beton
from rsa_fast.pipelines.packed import ENTRY, Packed
from rsa_fast.pipelines.shards import ShardWriter, open_shards, shard_path
from tests.helpers import DALI, FFCV, jpeg, write_folder
from tests.pipelines.backends import SPEC

COUNT, BATCH = 24, 8  # An epoch reads every image.


READ_FILES = ["native", pytest.param("dali", marks=DALI), "torchvision"]
while_reading = pytest.mark.parametrize("backend", READ_FILES)
every_backend = pytest.mark.parametrize("backend", ["resident", *READ_FILES])


def bomb(data: bytes) -> bytes:
    """Return a JPEG whose frame header claims 65,535 x 65,535 pixels."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + b"\xff" * 4 + data[at + 4 :]


def with_junk(data: bytes) -> bytes:
    """Insert bytes that belong to no segment: PIL and torchvision skip them, DALI does not."""
    at = data.index(b"\xff\xda")
    return data[:at] + b"\0\1" + data[at:]


# What can happen to the bytes of a file, and the error that PIL or the reader of the file reports.
DAMAGE: dict[str, tuple[Callable[[bytes], bytes | None], str]] = {
    "cut": (lambda data: data[: len(data) * 2 // 3], "truncated"),
    "header cut": (lambda data: data[:200], "Truncated File Read"),
    "emptied": (lambda data: b"", "cannot identify image file"),
    "zeros": (lambda data: data[:2] + bytes(len(data) - 2), "cannot identify image file"),
    "text": (lambda data: b"no image any more", "cannot identify image file"),
    "removed": (lambda data: None, "No such file"),
    "smaller": (
        lambda data: jpeg(7, 9, 30),
        r"\(9, 30\) px, but \(20, 20\) px in its manifest: the data changed",
    ),
    "larger": (
        lambda data: jpeg(7, 40, 30),
        r"\(40, 30\) px, but \(20, 20\) px in its manifest: the data changed",
    ),
    "bomb": (bomb, r"exceeds limit of 178956970 pixels"),
}
# Images 3 to 5 are bad in a row, and so are 22, 23 and 0: after the last comes the first.
BAD = dict(zip((0, 3, 4, 5, 9, 14, 17, 22, 23), DAMAGE, strict=True))


def stand_in(sample: int, bad: set[int] | dict = BAD, count: int = COUNT) -> int:
    while sample in bad:
        sample = (sample + 1) % count
    return sample


def damage(path: Path, kind: str) -> None:
    data = DAMAGE[kind][0](path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)


def open_loader(source, backend, rank=0, world_size=1, **options):
    order = Order(len(source.manifest), BATCH, 5, rank, world_size)
    return open_views(source, SPEC, frozenset(VIEWS), order, loading=Loading(backend, **options))


def views_of(batches, ids) -> dict[int, list[torch.Tensor]]:
    """Map each sample id to the label and the views in these complete batches."""
    return {
        int(sample): [batch.label[i], *(batch.views[name][i] for name in VIEWS)]
        for batch, chosen in zip(batches, ids, strict=True)
        for i, sample in enumerate(chosen)
    }


def assert_stood_in(batches, ids, whole: dict[int, list[torch.Tensor]], bad=BAD) -> None:
    for batch, chosen in zip(batches, ids, strict=True):
        wanted = [whole[stand_in(int(sample), bad, len(whole))] for sample in chosen]
        assert torch.equal(batch.label, torch.stack([parts[0] for parts in wanted]))
        for part, name in enumerate(VIEWS, 1):
            stacked = torch.stack([parts[part] for parts in wanted])
            assert torch.equal(batch.views[name], stacked), name


def epoch_ids(order: Order, epoch: int, step: int = 0) -> list[np.ndarray]:
    return [order.ids(epoch, s) for s in range(step, len(order))]


@pytest.fixture
def data(tmp_path) -> Path:
    return write_folder(tmp_path / "data", {"train": COUNT // 2})


@every_backend
def test_the_next_readable_image_stands_in_with_its_own_dice_and_label(data, backend, caplog):
    source = open_source(data, "pretrain")
    files = [data / path for path in source.manifest.paths]
    order = Order(COUNT, BATCH, 5)
    with open_loader(source, backend) as loader:
        whole = {
            epoch: views_of(loader.batches(epoch), epoch_ids(order, epoch)) for epoch in (1, 2)
        }
        assert loader.skipped == {}
    contents = [file.read_bytes() for file in files]

    def damage_all() -> None:
        for sample, kind in BAD.items():
            damage(files[sample], kind)

    if backend == "resident":  # This backend reads every image at the start.
        damage_all()
    with open_loader(source, backend, on_bad_image="skip") as loader:
        if backend != "resident":
            next(iter(loader.batches(0)))
            damage_all()
        for epoch in (1, 2):
            assert_stood_in(loader.batches(epoch), epoch_ids(order, epoch), whole[epoch])
        assert loader.skipped.keys() == BAD.keys()
        skips = (text for text in caplog.messages if text.startswith("skipped "))
        lines = [line.split(": ")[0] for line in skips]
        assert sorted(lines) == sorted(
            f"skipped sample {sample}, {source.manifest.paths[sample]}" for sample in BAD
        )
        with open_loader(source, backend, on_bad_image="skip") as resumed:
            assert_stood_in(resumed.batches(2, 1), epoch_ids(order, 2, 1), whole[2])
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
        # Images that were bad are not tried again.
        assert_stood_in(loader.batches(1), epoch_ids(order, 1), whole[1])


@while_reading
def test_ranks_stay_in_step_and_see_together_what_one_sees(data, backend):
    source = open_source(data, "pretrain")
    for sample, kind in BAD.items():
        damage(data / source.manifest.paths[sample], kind)
    seen = []
    for world_size in (1, 2, 4):
        ranks = []
        for rank in range(world_size):
            with open_loader(
                source, backend, rank, world_size, on_bad_image="skip", threads=1
            ) as loader:
                ranks.append(list(loader.batches(0)))
        seen.append(
            [torch.cat([batch.aggressive_2 for batch in step]) for step in zip(*ranks, strict=True)]
        )
    assert len(seen[0]) == 3
    for one, two, four in zip(*seen, strict=True):
        assert torch.equal(one, two) and torch.equal(one, four)


@every_backend
def test_stopping_names_the_sample_and_the_file_and_the_loader_lives_on(data, backend):
    source = open_source(data, "pretrain")
    order = Order(COUNT, BATCH, 5)
    sample = int(order.ids(0, 0)[3])
    path = data / source.manifest.paths[sample]
    content = path.read_bytes()
    with open_loader(source, backend, threads=1) as loader:
        whole = next(iter(loader.batches(0))).weak_1
        for kind, (_, said) in DAMAGE.items():
            damage(path, kind)
            place = source.manifest.paths[sample]
            message = f"(?s)sample {sample}, {place}: .*{said}.* --on-bad-image skip"
            with pytest.raises(ValueError, match=message) as caught:
                if backend == "resident":
                    open_loader(source, backend)
                next(iter(loader.batches(0)))
            assert "Traceback" not in str(caught.value)
            path.write_bytes(content)
        assert torch.equal(next(iter(loader.batches(0))).weak_1, whole)


@while_reading
def test_nothing_readable_is_an_error_not_a_loop(data, backend):
    source = open_source(data, "pretrain")
    shutil.rmtree(data / "train")
    with (
        open_loader(source, backend, on_bad_image="skip") as loader,
        pytest.raises(
            ValueError,
            match=r"none of the 24 images can be read, for example sample \d+, train/class_",
        ),
    ):
        next(iter(loader.batches(0)))


@while_reading
def test_what_only_the_backend_s_decoder_refuses_is_decoded_by_pil(data, backend):
    source = open_source(data, "pretrain")
    path = data / source.manifest.paths[int(Order(COUNT, BATCH, 5).ids(0, 1)[2])]
    with open_loader(source, backend) as loader:
        whole = list(loader.batches(0))
        path.write_bytes(with_junk(path.read_bytes()))
        for one, other in zip(loader.batches(0), whole, strict=True):
            assert torch.equal(one.aggressive_1, other.aggressive_1)


@DALI
def test_an_iterator_of_dali_left_before_a_bad_image_comes_up_leaves_nothing_behind(data):
    source = open_source(data, "pretrain")
    path = data / source.manifest.paths[int(Order(COUNT, BATCH, 5).ids(0, 1)[2])]
    content = path.read_bytes()
    with open_loader(source, "dali", prefetch_batches=3) as loader:
        whole = list(loader.batches(0))
        path.write_bytes(content[:-200])
        next(iter(loader.batches(0)))  # DALI has the bad batch and the next one already.
        path.write_bytes(content)
        for one, other in zip(loader.batches(0), whole, strict=True):
            assert torch.equal(one.weak_2, other.weak_2)


def test_unknown_policies_are_errors(data):
    with pytest.raises(ValueError, match="no on_bad_image 'ignore': choose from stop, skip"):
        open_loader(open_source(data, "pretrain"), "native", on_bad_image="ignore")


# --- packed files


def write_packed(data: Path, form: str) -> Callable[[], Packed]:
    """Write 24 JPEGs of 20x20 px as a .beton file or as shards; return what opens them."""
    data.mkdir()
    entries = np.zeros(COUNT, ENTRY)
    if form == "beton":
        writer = BetonWriter(data / "train.beton", COUNT, 4096, entries[:0])
    else:
        writer = ShardWriter(data / "train", 40_000, entries[:0])
        description = {"format": "shards", "version": 1, "count": COUNT, "classes": ["a", "b", "c"]}
        (data / "train.json").write_text(json.dumps(description))
    for i in range(COUNT):
        image = jpeg(i)
        entries[i] = (*writer.append(image, i % 3), len(image), i % 3, 20, 20, False)
    writer.finish(entries)
    writer.close()
    return lambda: (
        open_beton(data / "train.beton") if form == "beton" else open_shards(data / "train")
    )


PACKED = [
    ("native", "beton"),
    ("native", "shards"),
    pytest.param("ffcv", "beton", marks=FFCV),
    ("torchvision", "shards"),
]
packed_forms = pytest.mark.parametrize(("backend", "form"), PACKED)
# FFCV decodes with a faster DCT. PIL decodes the images that FFCV refuses, and their replacements.
LEVELS = {"ffcv": 3.0}


def overwrite(packed: Packed, sample: int, content: bytes) -> None:
    entry = packed.entries[sample]
    with packed.paths[entry["file"]].open("r+b") as file:
        file.seek(int(entry["offset"]))
        file.write((content + bytes(int(entry["size"])))[: entry["size"]])


@packed_forms
def test_an_image_overwritten_in_its_file_is_named_or_stood_in_for(tmp_path, backend, form):
    packed = write_packed(tmp_path / "data", form)()
    source, order = open_source(tmp_path / "data", "pretrain"), Order(COUNT, BATCH, 5)
    bad = {4: b"\xff\xd8", 5: jpeg(1, 8, 8), 23: bomb(jpeg(23))}
    file = "train.beton" if form == "beton" else r"shard-00000\d.tar"
    with open_loader(source, "torchvision", threads=1) as loader:
        whole = views_of(loader.batches(1), epoch_ids(order, 1))
    stops, skips = (
        open_loader(source, backend, threads=1, on_bad_image=policy) for policy in ("stop", "skip")
    )
    with stops, skips:
        next(iter(skips.batches(0)))
        for sample, content in bad.items():
            overwrite(packed, sample, content)
        with pytest.raises(ValueError, match=rf"sample (4|5|23): .*image \1 of .*{file}"):
            list(stops.batches(1))
        for batch, ids in zip(skips.batches(1), epoch_ids(order, 1), strict=True):
            wanted = [whole[stand_in(int(sample), bad)] for sample in ids]
            assert batch.label.tolist() == [int(label) for label, *_ in wanted]
            gap = (batch.weak_1 - torch.stack([views[1] for views in wanted])).abs() * 0.2 * 255
            assert gap.mean((1, 2, 3)).max() < LEVELS.get(backend, 1e-3)
        assert skips.skipped.keys() == bad.keys()


@packed_forms
def test_a_file_cut_during_the_run_loses_only_what_lay_behind_the_cut(tmp_path, backend, form):
    packed = write_packed(tmp_path / "data", form)()
    source, order = open_source(tmp_path / "data", "pretrain"), Order(COUNT, BATCH, 5)
    with open_loader(source, "torchvision", threads=1) as loader:
        whole = views_of(loader.batches(1), epoch_ids(order, 1))
    entry = packed.entries[14]
    with open_loader(source, backend, threads=1, on_bad_image="skip") as loader:
        next(iter(loader.batches(0)))
        os.truncate(packed.paths[entry["file"]], int(entry["offset"]) + int(entry["size"]) - 1)
        bad = {i for i in range(14, COUNT) if packed.entries["file"][i] == entry["file"]}
        for batch, ids in zip(loader.batches(1), epoch_ids(order, 1), strict=True):
            wanted = torch.stack([whole[stand_in(int(sample), bad)][1] for sample in ids])
            # PIL then reads FFCV's file.
            assert torch.allclose(batch.weak_1, wanted, atol=1e-6)
        assert (
            loader.skipped.keys() == bad
            and "the file was truncated after it was opened" in loader.skipped[14]
        )


@packed_forms
def test_a_file_replaced_during_the_run_is_read_on_as_it_was(tmp_path, backend, form):
    packed = write_packed(tmp_path / "data", form)()
    source = open_source(tmp_path / "data", "pretrain")
    with open_loader(source, backend, threads=1) as loader:
        before = list(loader.batches(0))
        for path in packed.paths:
            (tmp_path / "other").write_bytes(bytes(100_000))
            (tmp_path / "other").replace(path)
        for one, other in zip(loader.batches(0), before, strict=True):
            assert torch.equal(one.weak_1, other.weak_1)


@FFCV
def test_a_beton_replaced_before_ffcv_opens_it_is_refused(tmp_path):
    write_packed(tmp_path / "data", "beton")
    source = open_source(tmp_path / "data", "pretrain")
    entries, writer = (
        np.zeros(COUNT, ENTRY),
        BetonWriter(tmp_path / "other", COUNT, 4096, np.zeros(0, ENTRY)),
    )
    for i in range(COUNT):
        entries[i] = (*writer.append(bytes(48), 0), 48, 0, 4, 4, True)
    writer.finish(entries)
    (tmp_path / "other").replace(source.beton)
    with pytest.raises(
        ValueError, match=r"train\.beton was replaced while it was opened: start again"
    ):
        open_loader(source, "ffcv")


@FFCV
def test_a_process_that_used_ffcv_and_forked_ends_on_one_core():
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    code += "from rsa_fast.pipelines import ffcv_views\n"
    subprocess.run(
        [sys.executable, "-c", code + "os.fork() or os._exit(0); os.wait()"], timeout=60, check=True
    )


def test_a_member_s_name_in_a_shard_leads_nowhere(tmp_path):
    packed = write_packed(tmp_path / "data", "shards")()
    wanted = packed.stored(0)
    with shard_path(tmp_path / "data" / "train", 0).open("r+b") as file:
        file.write(b"../../../outside.jpg")
    source = open_source(tmp_path / "data", "pretrain")
    assert source.encoded(0) == wanted and not list(tmp_path.rglob("outside.jpg"))
