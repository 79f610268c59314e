"""`rsa-fast embed`: values, order, formats, places, ranks."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import rsa_fast
from rsa_fast.cli import main
from rsa_fast.distributed import rank
from rsa_fast.evaluation import embed as module
from rsa_fast.evaluation import features as feature_module
from rsa_fast.evaluation.embed import embed, read_embeddings
from rsa_fast.evaluation.encoders import load_encoder
from rsa_fast.pipelines.layouts import open_source
from rsa_fast.pipelines.order import epoch_order
from tests.helpers import invoke, natural_image, result_of, write_folder
from tests.rsa_fast.ranks import run_ranks
from tests.tiny_runs import expected_features, write_untrained_run

SUFFIXES = (".npz", ".npy", ".parquet", ".csv")


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    return write_untrained_run(tmp_path_factory.mktemp("runs") / "a", folder)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_rows_are_what_the_encoder_returns_in_the_order_of_the_images(
    run, folder, tmp_path, suffix, monkeypatch
):
    monkeypatch.setattr(feature_module, "BATCH_SIZE", 7)
    monkeypatch.setattr(module, "BLOCK_ROWS", 10)  # The last block of 40 rows is short.
    out, source = tmp_path / f"emb{suffix}", open_source(folder, "pretrain")
    result = embed(run, None, out)  # the newest checkpoint, the run's images
    names, labels = list(source.manifest.paths), source.manifest.labels.tolist()
    expected = expected_features(run, source).numpy()
    assert (result["rows"], result["dim"], result["left_out"]) == (40, expected.shape[1], 0)
    path = run / "checkpoints" / "step_00000002.pt"
    assert result["checkpoint_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert json.loads((tmp_path / f"emb{suffix}.json").read_text())["rows"] == 40

    # Each format is read as a user's script reads it.
    classes = [f"class_{label}" for label in labels]
    match suffix:
        case ".npz":
            arrays = np.load(out)
            features = arrays["features"]
            assert arrays["filenames"].tolist() == names and arrays["labels"].tolist() == labels
            assert arrays["classes"].tolist() == ["class_0", "class_1"]
        case ".npy":
            features = np.load(out)
            rows = list(csv.reader((tmp_path / "emb.npy.tsv").open(), delimiter="\t"))
            assert rows[0] == ["filename", "label", "class"]
            assert rows[1:] == [
                list(row) for row in zip(names, map(str, labels), classes, strict=True)
            ]
        case ".parquet":
            table = pq.read_table(out)
            assert table.schema.field("embedding").type == pa.list_(pa.float32(), result["dim"])
            assert table["filename"].to_pylist() == names and table["label"].to_pylist() == labels
            assert table["class"].to_pylist() == classes
            features = np.array(table["embedding"].to_pylist(), np.float32)
        case ".csv":
            head, *rows = csv.reader(out.open())
            dim = result["dim"]
            assert head == ["filename", *(f"embedding_{i}" for i in range(dim)), "label", "class"]
            assert [row[0] for row in rows] == names and [row[-1] for row in rows] == classes
            features = np.array([row[1 : dim + 1] for row in rows], np.float32)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


def test_every_format_gives_the_same_numbers_bit_for_bit(run, folder, tmp_path):
    contents = []
    for suffix in SUFFIXES:
        embed(run, folder, tmp_path / f"emb{suffix}", split="test")
        contents.append(read_embeddings(tmp_path / f"emb{suffix}"))
    first = contents[0]
    assert len(first.features) == 20 and first.classes == ("class_0", "class_1")
    for other in contents[1:]:
        assert (other.features == first.features).all() and (other.labels == first.labels).all()
        assert list(other.filenames) == list(first.filenames) and other.classes == first.classes


def test_the_command_and_the_function_write_the_same_file(run, folder, tmp_path):
    words = ["embed", "--checkpoint", run, "--data", folder, "--out", tmp_path / "a.csv"]
    done = invoke(main, *words)
    assert result_of(done)["rows"] == 40
    rsa_fast.embed(run, folder, tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_images_without_classes_are_as_lightly_trains_csv_and_null_elsewhere(run, tmp_path):
    for name in ("b", "a", "deep/er"):
        path = tmp_path / "photos" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(natural_image(1, 20, 20)).save(path)
    for suffix in SUFFIXES:
        embed(run, tmp_path / "photos", tmp_path / f"emb{suffix}", unlabelled=True)
        rows = read_embeddings(tmp_path / f"emb{suffix}")
        assert list(rows.filenames) == ["a.png", "b.png", "deep/er.png"]
        assert rows.labels.tolist() == [-1] * 3 and rows.classes == ()
    assert (tmp_path / "emb.csv").read_text().splitlines()[0].endswith(f"_{rows.result['dim'] - 1}")
    assert pq.read_table(tmp_path / "emb.parquet")["label"].null_count == 3


def test_bad_images_have_no_row_and_are_counted_in_a_line(run, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(feature_module, "BATCH_SIZE", 4)
    data = write_folder(tmp_path / "data", {"train": 5})
    whole = tmp_path / "whole.npy"
    embed(run, data, whole)
    # One is no image, which its header shows; one ends too early, which is seen when it is decoded.
    (data / "train" / "class_0" / "001.jpg").write_bytes(b"junk")
    path = data / "train" / "class_1" / "003.jpg"
    real_read = open_source(data, "pretrain", on_bad_image="skip").read

    def read(self_path):
        if self_path == path:
            raise ValueError(f"cannot read image {path}: cut")
        return real(self_path)

    from rsa_fast.pipelines import layouts

    real = layouts.read_rgb
    assert real_read(0).shape == (20, 20, 3)
    monkeypatch.setattr(layouts, "read_rgb", read)
    with caplog.at_level(logging.INFO, "rsa_fast"):
        for suffix in SUFFIXES:
            result = embed(run, data, tmp_path / f"emb{suffix}")
            assert (result["rows"], result["left_out"]) == (8, 2)
            rows = read_embeddings(tmp_path / f"emb{suffix}")
            kept = [i for i in range(10) if i not in (1, 8)]
            before = read_embeddings(whole)
            assert list(rows.filenames) == [before.filenames[i] for i in kept]
            np.testing.assert_allclose(rows.features, before.features[kept], rtol=1e-4, atol=1e-5)
    assert "2 images could not be read and have no row" in caplog.messages


def test_packed_images_are_numbered_and_equal_to_those_of_the_files(run, folder, beton, tmp_path):
    embed(run, folder, tmp_path / "files.npy")
    files = read_embeddings(tmp_path / "files.npy")
    embed(run, beton, tmp_path / "packed.npy")
    rows = read_embeddings(tmp_path / "packed.npy")
    assert list(rows.filenames) == list(map(str, range(40)))
    # The images are packed in the shuffled order of the converter.
    order = epoch_order(40, 0, 0)
    np.testing.assert_allclose(rows.features, files.features[order], rtol=1e-4, atol=1e-5)
    assert rows.labels.tolist() == files.labels[order].tolist()


def test_tar_shards_are_read(run, folder, tmp_path):
    from rsa_fast.tools.index import main as index

    (tmp_path / "wds").mkdir()
    with tarfile.open(tmp_path / "wds" / "shard-0.tar", "w") as tar:
        tar.add(folder / "train", "train")
    done = invoke(index, tmp_path / "wds")
    assert done.exit_code == 0, done.output
    result = embed(run, tmp_path / "wds", tmp_path / "emb.npz")
    rows = read_embeddings(tmp_path / "emb.npz")
    assert result["rows"] == 40 and list(rows.filenames) == list(map(str, range(40)))
    expected = expected_features(run, open_source(tmp_path / "wds", "pretrain")).numpy()
    np.testing.assert_allclose(rows.features, expected, rtol=1e-4, atol=1e-5)


def test_another_project_s_encoder_wants_the_transform(run, folder, tmp_path):
    encoder, _ = load_encoder(run / "checkpoints" / "step_00000002.pt")
    path = tmp_path / "foreign.pth"
    torch.save({f"backbone.{key}": value for key, value in encoder.state_dict().items()}, path)
    with pytest.raises(ValueError, match=r"foreign\.pth has no recipe: use --dataset"):
        embed(path, folder, tmp_path / "emb.npy")
    with pytest.raises(ValueError, match="does not record where its images are: give --data"):
        embed(path, None, tmp_path / "emb.npy")
    fields = {"views.size_px": 16, "precision": "fp32"}
    embed(path, folder, tmp_path / "emb.npy", dataset="cifar10", overrides=fields)
    embed(run, folder, tmp_path / "own.npy")
    assert (np.load(tmp_path / "emb.npy") == np.load(tmp_path / "own.npy")).all()


@pytest.mark.parametrize("name", ["emb", "emb.txt", "emb.NPZ"])
def test_an_unknown_format_is_refused_before_anything_is_read(name, tmp_path):
    with pytest.raises(ValueError, match=r"the name must end in \.npz, \.npy, \.parquet"):
        embed(tmp_path / "none", None, tmp_path / name)


def test_parquet_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs pyarrow: \S+ -m pip install pyarrow"):
        embed(tmp_path / "none", None, tmp_path / "emb.parquet")


def test_a_failed_start_leaves_the_file_as_it_was(run, folder, tmp_path, monkeypatch):
    out = tmp_path / "emb.npy"
    embed(run, folder, out)
    before = out.read_bytes()
    monkeypatch.setattr(module, "join", lambda blocks: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        embed(run, folder, out)
    assert out.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {
        "emb.npy",
        "emb.npy.json",
        "emb.npy.tsv",
    }


def embeddings_of_ranks(folder: Path) -> dict[str, dict]:
    """What this rank gets."""
    feature_module.BATCH_SIZE, results = 4, {}
    for name in ("data", "one"):
        for suffix in (".npy", ".parquet"):
            out = folder / f"{name}{suffix}"
            result = embed(folder / "run", folder / name, out, unlabelled=name == "one")
            results[out.name] = {"rows": result["rows"], "rank": rank()}
    return results


@pytest.mark.parametrize("ranks", [2, 4])
def test_several_ranks_write_what_one_writes(tmp_path, monkeypatch, ranks):
    write_untrained_run(tmp_path / "run")
    # 21 images in batches of 4 for each rank: the last batch has none for some ranks.
    data = write_folder(tmp_path / "data", {"train": 7}, classes=3)
    (tmp_path / "one").mkdir()
    Image.fromarray(natural_image(1, 20, 20)).save(tmp_path / "one" / "a.png")
    results = run_ranks(embeddings_of_ranks, ranks, tmp_path)
    assert [one["data.npy"] for one in results] == [{"rows": 21, "rank": r} for r in range(ranks)]
    assert [one["one.npy"]["rows"] for one in results] == [1] * ranks
    embed(tmp_path / "run", data, tmp_path / "alone.npy")
    alone = read_embeddings(tmp_path / "alone.npy")
    for name in ("data.npy", "data.parquet"):
        rows = read_embeddings(tmp_path / name)
        assert list(rows.filenames) == list(alone.filenames)
        np.testing.assert_allclose(rows.features, alone.features, rtol=1e-4, atol=1e-5)
