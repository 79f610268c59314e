"""Worker processes: what they collect, and how they hand over their batches."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from rsa_fast.pipelines import Loading, Order, ViewSpec, open_source, open_views
from rsa_fast.pipelines.coco import open_loader
from rsa_fast.pipelines.workers import FORKS
from tests.garbage import Garbage, collectors
from tests.helpers import ROOT

UNSHARE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
SMALL = "mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "
CODE = """
import logging, sys, torch
from pathlib import Path
from rsa_fast.pipelines import Loading, Order, ViewSpec, open_source, open_views
from rsa_fast.pipelines.coco import parcel
from torch.utils.data import DataLoader

logging.basicConfig(level="INFO", format="%(message)s")
data, out = map(Path, sys.argv[1:])
source = open_source(data, "pretrain")
spec = ViewSpec(64, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
order, loading = Order(16, 8, 5), Loading("torchvision", threads=2)
with open_views(source, spec, frozenset(["weak_1"]), order, loading=loading) as loader:
    views = [batch.weak_1 for batch in loader.batches(0)]
detected = [(torch.full((3, 200, 200), i), {"labels": torch.tensor([i])}) for i in range(4)]
batches = list(DataLoader(detected, batch_size=2, num_workers=1, collate_fn=parcel))
torch.save([views, batches], out)
"""


def can_unshare() -> bool:
    if not shutil.which("unshare"):
        return False
    return subprocess.run([*UNSHARE, f"{SMALL} true"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_unshare(), reason="a small /dev/shm needs user namespaces (unshare)")
def test_batches_larger_than_dev_shm_arrive_and_it_is_said(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(16):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    results = []
    for command in ([], [*UNSHARE, f'{SMALL} "$0" "$@"']):
        out = tmp_path / f"{len(command)}.pt"
        done = subprocess.run(
            [*command, sys.executable, "-c", CODE, str(tmp_path / "images"), str(out)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("no room in /dev/shm") == bool(command)
        results.append(torch.load(out))
    (views, batches), (small_views, small_batches) = results
    assert len(views) == 2 and all(map(torch.equal, views, small_views))
    assert [v.stride() for v in views] == [v.stride() for v in small_views]
    assert len(batches) == 2
    for batch, small in zip(batches, small_batches, strict=True):
        for (image, objects), (same_image, same_objects) in zip(batch, small, strict=True):
            assert torch.equal(image, same_image)
            assert torch.equal(objects["labels"], same_objects["labels"])


@pytest.fixture
def forkserver():
    """The start method that is the default on Linux from Python 3.14 on."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_a_worker_collects_its_own_garbage_and_none_that_it_inherits(garbage):
    read_end, write_end = os.pipe()

    def work() -> None:
        gc.collect()
        inherited = collectors(garbage)
        Garbage(garbage)
        gc.collect()
        os.write(write_end, str([gc.isenabled(), inherited, collectors(garbage)]).encode())

    frozen = gc.get_freeze_count()
    worker = FORKS.Process(target=work)
    worker.start()
    worker.join()
    assert os.read(read_end, 100).decode() == str([True, set(), {worker.pid}])
    assert gc.get_freeze_count() == frozen and not gc.isenabled()  # This process is as before.
    gc.collect()
    assert collectors(garbage) == {worker.pid, os.getpid()}


def test_the_workers_of_views_are_forked_whatever_the_default(folder, forkserver, garbage):
    on_disk = open_source(folder, "pretrain")

    def read(sample):  # a function of this function cannot be pickled
        gc.collect()
        return on_disk.read(sample)

    source = replace(on_disk, read=read)
    spec = ViewSpec(16, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    order, threads = Order(40, 8, 5), Loading("torchvision", threads=1)
    with open_views(source, spec, frozenset(["weak_1"]), order, loading=threads) as loader:
        assert next(loader.batches(0)).weak_1.shape == (8, 3, 16, 16)
    assert not collectors(garbage)


class Detected(list):
    """Images with their objects, which cannot be sent to another process."""

    def __reduce__(self):
        raise TypeError("not to be pickled")

    def __getitem__(self, index):
        gc.collect()
        return super().__getitem__(index)


def test_the_workers_of_detection_are_forked_whatever_the_default(forkserver, garbage):
    objects = {"labels": torch.tensor([1])}
    images = Detected([(torch.zeros(3, 8, 8), objects)] * 4)
    plan = (ids for ids in ([0, 1], [2, 3]))
    loader = open_loader(images, plan, 1, torch.device("cpu"))
    assert [len(batch) for batch in loader] == [2, 2]
    assert not collectors(garbage)
