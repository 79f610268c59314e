"""FFCV's loader with our kernels.

The views are exact and never overwritten, the process keeps its settings, and threads are joined.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from rsa_fast.insight.profiling import evict
from rsa_fast.pipelines import VIEWS, Loading, Order, ViewSpec, open_source, open_views
from rsa_fast.pipelines.extents import Extents
from tests.helpers import FFCV, invoke, read_bytes, write_raw_beton
from tests.pipelines.backends import SPEC, open_loader

pytestmark = FFCV


@pytest.fixture(scope="module")
def loader(beton):
    with open_loader(beton, "ffcv") as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(beton):
    with open_loader(beton, "torchvision", threads=1) as opened:
        return list(opened.batches(0))


def equal(ours, theirs, reads=VIEWS):
    same = [torch.allclose(ours.views[name], theirs.views[name], atol=1e-6) for name in reads]
    return all(same) and torch.equal(ours.label, theirs.label)


def test_views_equal_the_reference_and_are_never_overwritten(loader, reference):
    kept = list(loader.batches(0))  # Five batches are kept; the loader makes two ahead.
    assert len(kept) == 5 and all(
        equal(ours, theirs) for ours, theirs in zip(kept, reference, strict=True)
    )
    every = [view for batch in kept for view in batch.views.values()]
    assert len(every) == 5 * len(VIEWS)
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in every)


@pytest.mark.parametrize("aggressive_on", ["host", "device"])
def test_flips_and_turns_equal_the_reference(beton, aggressive_on):
    aerial = replace(SPEC, vertical_flip_p=0.5, quarter_turns=True)
    with (
        open_loader(beton, "ffcv", spec=aerial, aggressive_on=aggressive_on) as ours,
        open_loader(beton, "torchvision", spec=aerial, threads=1) as theirs,
    ):
        reads = VIEWS if aggressive_on == "host" else VIEWS[:2]
        for one, other in zip(ours.batches(0), theirs.batches(0), strict=True):
            assert equal(one, other, reads)


def test_of_a_cold_file_only_the_images_of_the_batches_are_read(loader, tmp_path, monkeypatch):
    """Of 96 images of 120 kB, those of the first batches are read, and little besides.

    With the read-ahead of a device of 128 KiB, twice as much was read, and with 8 MiB all of it.
    """
    list(loader.batches(0))  # so that the compiled code has been read
    path = write_raw_beton(tmp_path, 96, 200) / "train.beton"
    asked, ask = [], Extents.read_soon
    monkeypatch.setattr(
        Extents, "read_soon", lambda extents, ids: asked.append(ids) or ask(extents, ids)
    )
    with open_loader(tmp_path, "ffcv", threads=1, prefetch_batches=1) as cold:
        if fault := evict([path]):
            pytest.skip(f"files cannot be dropped from the page cache here: {fault}")
        before = read_bytes()
        batches = cold.batches(0)
        first = next(batches)
        batches.close()
        read = read_bytes() - before
        order = cold.job.order
    assert first.ids.tolist() == order.ids(0, 0).tolist()
    assert [ids.tolist() for ids in asked] == [
        order.ids(0, step).tolist() for step in range(len(asked))
    ]
    wanted = sum(map(len, asked)) * 3 * 200**2
    assert 2 <= len(asked) < 6 and wanted < 0.5 * path.stat().st_size
    assert read < 1.1 * wanted


def test_starting_at_a_step_is_a_jump_and_leaving_early_leaves_nothing(loader, reference):
    for _ in zip(range(2), loader.batches(1), strict=False):
        pass
    rest = list(loader.batches(0, 3))
    assert len(rest) == 2 and all(
        equal(ours, theirs) for ours, theirs in zip(rest, reference[3:], strict=True)
    )
    assert not any("EpochIterator" in type(thread).__name__ for thread in threading.enumerate())


def test_torch_keeps_its_threads(loader):
    torch.set_num_threads(2)  # Importing ffcv elsewhere sets one thread.
    next(iter(loader.batches(0)))
    assert torch.get_num_threads() == 2


def test_ranks_see_together_what_one_rank_sees_and_read_only_what_they_are_asked(beton, reference):
    reads = ("aggressive_1", "weak_2")
    ranks = []
    for rank in (0, 1):
        with open_loader(
            beton, "ffcv", reads, rank=rank, world_size=2, threads=1, dtype=torch.bfloat16
        ) as opened:
            ranks.append(list(opened.batches(0)))
    for step, whole in enumerate(reference):
        for name in reads:
            halves = torch.cat([rank[step].views[name] for rank in ranks])
            assert torch.equal(halves, whole.views[name].to(torch.bfloat16))
        assert ranks[0][step].views.keys() == set(reads)


def test_the_device_makes_the_aggressive_views_of_the_same_weak_ones(beton, reference):
    with open_loader(beton, "ffcv", aggressive_on="device", threads=1) as opened:
        ours = next(iter(opened.batches(0)))
    assert equal(ours, reference[0], ("weak_1", "weak_2"))
    gap = (ours.aggressive_1 - reference[0].aggressive_1).abs().mean() * 0.2 * 255
    assert 0 < gap < 0.4


def test_a_stored_jpeg_that_does_not_decode_is_named(folder, tmp_path):

    from rsa_fast.pipelines.beton import open_beton
    from rsa_fast.tools.to_ffcv import main

    assert (
        invoke(main, folder, tmp_path, "--write-mode", "passthrough", "--workers", "1").exit_code
        == 0
    )
    path = tmp_path / "train.beton"
    entry = open_beton(path).entries[11]
    content = bytearray(path.read_bytes())
    content[entry["offset"] : entry["offset"] + entry["size"]] = bytes(int(entry["size"]))
    path.write_bytes(content)
    named = pytest.raises(ValueError, match=r"cannot decode image 11 of .*train\.beton")
    with open_loader(tmp_path, "ffcv", threads=1) as opened, named:
        list(opened.batches(0))


def test_an_error_on_ffcv_s_thread_reaches_the_one_who_reads(beton, monkeypatch):
    with open_loader(beton, "ffcv") as opened, pytest.raises(MemoryError, match="no room"):
        monkeypatch.setattr(
            opened.transfer, "take", lambda count: (_ for _ in ()).throw(MemoryError("no room"))
        )
        list(opened.batches(0))


def test_another_loader_compiles_nothing(loader, beton):
    from rsa_fast.pipelines.ffcv_views import decode_views

    list(loader.batches(0))
    compiled = decode_views.signatures
    for options in ({}, {"threads": 1}, {"reads": VIEWS[2:]}):
        with open_loader(beton, "ffcv", **options) as opened:
            list(opened.batches(0))
    assert decode_views.signatures == compiled


def test_other_data_are_refused(folder):
    with pytest.raises(ValueError, match=r"backend ffcv reads one \.beton file: convert"):
        open_loader(folder, "ffcv")


def test_the_dice_are_those_of_the_sample_whatever_came_before(loader, reference):
    list(loader.batches(4))
    assert equal(next(iter(loader.batches(0))), reference[0])


@pytest.mark.parametrize("settings", [("passthrough",), ("jpg", "--max-resolution", "500")])
def test_views_of_stored_jpegs_equal_pil_s_of_ffcv_s_own_pixels(imagenet, tmp_path, settings):
    """From FFCV's pixels on, the views equal PIL's.

    FFCV decodes with a faster DCT than PIL, with a difference of 1.2 levels.
    """
    from ffcv.libffcv import imdecode

    from rsa_fast.tools.to_ffcv import main

    assert invoke(main, imagenet, tmp_path, "--write-mode", *settings).exit_code == 0
    stored = open_source(tmp_path, "pretrain")

    def read(sample: int) -> np.ndarray:
        height, width = stored.manifest.sizes[sample]
        image = np.empty((height, width, 3), np.uint8)
        data = np.frombuffer(stored.encoded(sample), np.uint8)
        assert imdecode(data, image, height, width, height, width, 0, 0, 1, 1, False, False) == 0
        return image

    spec = ViewSpec(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    views = []
    for source, backend in ((stored, "ffcv"), (replace(stored, read=read), "torchvision")):
        with open_views(
            source, spec, frozenset(VIEWS), Order(320, 16, 0), loading=Loading(backend)
        ) as opened:
            views.append(next(iter(opened.batches(0))))
    assert equal(*views)


def test_further_fields_are_not_decoded(beton, reference, tmp_path):
    """The same images and labels among other fields make the same views."""
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    source = open_source(beton, "pretrain")
    labels = source.manifest.labels
    fields = {
        "index": (IntField(), lambda i: i),
        "score": (FloatField(), float),
        "image": (RGBImageField(write_mode="raw"), source.read),
        "mask": (RGBImageField(write_mode="raw"), lambda i: source.read(i)[:5]),
        "text": (BytesField(), lambda i: np.zeros(i, np.uint8)),
        "meta": (JSONField(), lambda i: {"i": i}),
        "box": (NDArrayField(np.dtype("<f4"), (4,)), lambda i: np.zeros(4, "<f4")),
        "label": (IntField(), lambda i: int(labels[i])),
    }
    rows = [tuple(value(i) for _, value in fields.values()) for i in range(len(labels))]
    writer = DatasetWriter(
        str(tmp_path / "train.beton"),
        {name: field for name, (field, _) in fields.items()},
        2**21,
        1,
    )
    writer.from_indexed_dataset(rows)
    with open_loader(tmp_path, "ffcv") as opened:
        ours = list(opened.batches(0))
    assert len(ours) == 5 and all(map(equal, ours, reference))
