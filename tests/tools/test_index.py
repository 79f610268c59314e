"""The index of tar shards made elsewhere: every image once, where it is, with its label."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

from rsa_fast.pipelines import VIEWS, Loading, Order, open_views
from rsa_fast.pipelines.shards import holds_shards, shard_source
from rsa_fast.pipelines.sources import to_rgb
from rsa_fast.tools.index import main
from tests.helpers import NO_DALI, encoded, invoke, natural_image, result_of
from tests.pipelines.backends import SPEC

Member = tuple[str, bytes]


def image(seed: int, form: str = "jpeg") -> bytes:
    return encoded(natural_image(seed, 20 + seed, 30), form)


def write_tar(path: Path, members: Iterable[Member], form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def sample(seed: int, label: object, key: str = "", suffix: str = "jpg") -> list[Member]:
    form = "png" if suffix == "png" else "jpeg"
    key = key or f"{seed:06}"
    return [(f"{key}.{suffix}", image(seed, form)), (f"{key}.cls", str(label).encode())]


def run(place: Path) -> Result:
    return invoke(main, place)


def index(place: Path) -> dict[str, dict[str, object]]:
    return result_of(run(place))


def content(source, seeds: Iterable[int], labels: list[int], form: str = "jpeg") -> None:
    """Compare a source with the images of these seeds."""
    assert source.manifest.labels.tolist() == labels
    for i, seed in enumerate(seeds):
        wanted = to_rgb(Image.open(io.BytesIO(image(seed, form))))
        assert (source.read(i) == wanted).all()
        assert source.manifest.sizes[i].tolist() == list(wanted.shape[:2])
        assert source.encoded(i) == image(seed, form)
    assert len(source.manifest) == i + 1


def test_both_splits_in_one_folder_by_timm_s_names(tmp_path):
    write_tar(tmp_path / "imagenet1k-train-0000.tar", sample(0, 2) + sample(1, 0))
    write_tar(tmp_path / "imagenet1k-train-0001.tar", sample(2, 3))
    write_tar(tmp_path / "imagenet1k-validation-00.tar", sample(3, 1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    summary = index(tmp_path)[str(tmp_path)]
    assert summary["shards"] == {"train": 2, "val": 1} and summary["images"] == 4
    train, test = (shard_source(tmp_path, split) for split in ("pretrain", "test"))
    content(train, [0, 1, 2], [2, 0, 3])
    content(test, [3], [1])
    assert train.manifest.classes == test.manifest.classes == ("0", "1", "2", "3")
    assert train.files(range(3)) == [tmp_path / f"imagenet1k-train-000{i}.tar" for i in (0, 1)]
    assert holds_shards(tmp_path) and holds_shards(tmp_path, "test")
    assert {path.name for path in tmp_path.iterdir()} == {*before, "index.npz", "index.json"}
    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())


def test_train_and_val_folders_have_the_same_classes(tmp_path):
    write_tar(tmp_path / "train" / "a.tar", sample(0, "dog") + sample(1, "ant"))
    write_tar(tmp_path / "val" / "shard-000000.tar", sample(2, "dog"))
    assert index(tmp_path).keys() == {str(tmp_path / name) for name in ("train", "val")}
    train, val = (shard_source(tmp_path / name, "train") for name in ("train", "val"))
    assert train.manifest.classes == val.manifest.classes == ("ant", "dog")
    content(train, [0, 1], [1, 0])
    content(val, [2], [1])
    assert holds_shards(tmp_path / "train") and not holds_shards(tmp_path)
    assert not holds_shards(tmp_path / "train", "test")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_names_that_are_no_utf_8(tmp_path, form):
    members = [*sample(0, 1, key="train/" + "long/" * 60 + "x"), *sample(1, 0, key="caf\udce9")]
    write_tar(tmp_path / "sh\udce9rd.tar", members, form)
    index(tmp_path)
    content(shard_source(tmp_path, "train"), [0, 1], [1, 0])


def test_the_members_of_a_sample_are_those_with_the_same_key(tmp_path):
    def entry(name: str, label: object) -> Member:
        return name, json.dumps(label).encode()

    members = [
        # All images come first, as in tar's order by folder.
        ("b/1.jpeg", image(0)),
        ("a/1.JPG", image(1)),
        ("a/2.jpg", image(2)),
        ("3.jpg", image(3)),
        ("4.jpg", image(4)),
        entry("a/1.json", {"label": 3, "width": 30}),
        entry("b/1.json", {"cls": "5"}),
        entry("a/2.json", {"caption": "without a label"}),
        entry("3.json", {"class": [1, 2]}),
        ("a/2.seg.png", image(9, "png")),
        ("a/1.txt", b"a caption"),
        ("a/._1.jpg", b"of macOS"),
        ("README", b"without a suffix"),
    ]
    write_tar(tmp_path / "x.tar", members)
    done = run(tmp_path)
    assert done.exit_code == 0, done.output
    for part in ("1 .txt", "1 .seg.png", "1 hidden", "1 without a suffix"):
        assert part in done.stderr.splitlines()[-1]
    assert json.loads(done.stdout.splitlines()[-1])[str(tmp_path)]["without_label"] == 3
    content(shard_source(tmp_path, "train"), range(5), [5, 3, -1, -1, -1])


FAULTS = [
    ([("a/1.cls", b"3")], r"x\.tar: a/1 has no image, only \.cls"),
    (
        [("a/1.jpg", image(0)), ("a/1.png", image(1, "png"))],
        r"x\.tar: a/1 has 2 images: .jpg, .png",
    ),
    ([("1.jpg", image(0)), ("1.jpg", image(1))], r"x\.tar: 1 has \.jpg twice"),
    ([("1.jpg", image(0)), ("1.json", b"{")], r"x\.tar: 1 has a \.json that cannot be read"),
]


@pytest.mark.parametrize(("members", "message"), FAULTS)
def test_a_sample_that_is_not_one_image_is_named(tmp_path, members, message):
    write_tar(tmp_path / "x.tar", sample(5, 1) + members)
    with pytest.raises(AssertionError, match=message):
        index(tmp_path)
    assert not (tmp_path / "index.npz").exists()


def test_a_linked_image_is_named(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        link = tarfile.TarInfo("1.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere.jpg"
        tar.addfile(link)
    assert "x.tar: 1.jpg is a link" in run(tmp_path).output


def test_an_unreadable_image_is_left_out_by_name(tmp_path):
    write_tar(tmp_path / "x.tar", [*sample(0, 1), ("9.jpg", b"junk"), *sample(1, 2)])
    done = run(tmp_path)
    assert done.exit_code == 0
    assert "left out 1 images that cannot be read: x.tar: 9.jpg: cannot identify" in done.stderr
    content(shard_source(tmp_path, "train"), [0, 1], [1, 2])


def test_incomplete_and_compressed_files_are_refused_with_the_reason(tmp_path):
    path = write_tar(tmp_path / "x.tar", sample(0, 1) + sample(1, 2))
    whole = path.read_bytes()
    for cut, message in (
        (whole[:2000], "is not a complete tar file"),
        (whole[: whole.index(b"\xff\xd9")], "is not a complete tar file: unexpected end of data"),
        (whole[: 512 * (len(whole) // 512 // 2)], "is not a complete tar file"),
        (whole.rstrip(b"\0")[:-1] + b"x" * 512, "is not a complete tar file"),
        (b"", "is not a complete tar file: empty file"),
        (whole + whole, "data follow its end mark at byte"),
    ):
        path.write_bytes(cut)
        done = run(tmp_path)
        assert done.exit_code == 1 and str(path) in done.output and message in done.output
    with tarfile.open(path, "w:gz"):
        pass
    assert f"{path} is compressed" in run(tmp_path).output
    path.rename(tmp_path / "x.tar.gz")
    assert "x.tar.gz is compressed" in run(tmp_path).output
    (tmp_path / "x.tar.gz").unlink()
    assert f"no .tar files in {tmp_path}" in run(tmp_path).output


def test_a_folder_without_an_index_names_the_command_and_new_shards_are_noticed(tmp_path):
    write_tar(tmp_path / "train" / "a.tar", sample(0, 1))
    with pytest.raises(
        FileNotFoundError, match=rf"index\.npz: rsa-fast convert index {tmp_path} w"
    ):
        shard_source(tmp_path / "train", "train")
    index(tmp_path)
    write_tar(tmp_path / "train" / "b.tar", sample(1, 1))
    with pytest.raises(ValueError, match=r"1 of the \.tar files are not in it, such as b\.tar"):
        shard_source(tmp_path / "train", "train")
    index(tmp_path)
    content(shard_source(tmp_path / "train", "train"), [0, 1], [1, 1])


def test_an_index_names_only_files_of_its_folder(tmp_path):
    write_tar(tmp_path / "x.tar", sample(0, 1))
    index(tmp_path)
    with np.load(tmp_path / "index.npz") as stored:
        columns = dict(stored)
    for name in (b"../x.tar", b"/etc/passwd", b"..", b"x.tar\0"):
        columns["names"] = np.frombuffer(name, np.uint8)
        np.savez(tmp_path / "index.npz", **columns)
        with pytest.raises(ValueError, match="is not the name of a file in the folder"):
            shard_source(tmp_path, "train")


@pytest.mark.parametrize("backend", ["resident", "native", "dali"])
def test_png_members_make_the_reference_s_views(tmp_path, backend):
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason=NO_DALI)
    members = [sample(i, i % 2, suffix="png" if i % 2 else "jpg") for i in range(8)]
    write_tar(tmp_path / "x.tar", chain.from_iterable(members))
    index(tmp_path)
    source = shard_source(tmp_path, "pretrain")
    batches = []
    for name in (backend, "torchvision"):
        loading = Loading(name, threads=1)
        with open_views(source, SPEC, frozenset(VIEWS), Order(8, 8, 5), loading=loading) as loader:
            batches += loader.batches(0)
    ours, theirs = batches
    tolerance = 0.2 if backend == "dali" else 1e-6
    assert (ours.label == theirs.label).all()
    for name in VIEWS:
        assert (ours.views[name] - theirs.views[name]).abs().mean() < tolerance
