from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from torchvision.datasets import ImageFolder

from rsa_fast.pipelines.layouts import open_source
from rsa_fast.pipelines.manifest import array_manifest
from rsa_fast.pipelines.sources import Source, read_rgb
from rsa_fast.tools.to_dali import main as to_dali
from rsa_fast.tools.to_ffcv import main as to_ffcv
from rsa_fast.tools.verify import main
from tests.helpers import invoke, natural_image, write_folder

LIMIT = 64 * 64  # pixels


def run(data: Path, *options: str) -> tuple[int, dict]:
    result = invoke(main, data, "--workers", "2", "--max-pixels", LIMIT, *options)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    assert "verify" in result.stderr and "corrupt" in result.stdout  # progress and table
    return result.exit_code, json.loads(result.stdout.splitlines()[-1])


def png_of_16_bits(path: Path) -> None:
    """Write an RGB PNG with 16 bits a channel, which PIL reads but does not write."""
    pixels = natural_image(3, 20, 20).astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 20, 20, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    packed = (
        struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))
        for tag, body in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


@pytest.fixture
def planted(tmp_path: Path) -> tuple[Path, dict[str, set[str]]]:
    """Write a data set with every kind of damage; return it and the paths of each kind."""
    data = write_folder(tmp_path / "data", {"train": 4, "val": 2}, size=(40, 50))
    folder = data / "train" / "class_1"
    rgb = Image.fromarray(natural_image(1, 48, 60))

    def cut(path: Path, share: float) -> None:
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    (folder / "text.jpg").write_text("404 not found")
    whole = (data / "train" / "class_0" / "000.jpg").read_bytes()
    (folder / "header_only.jpg").write_bytes(whole[:60])
    rgb.save(folder / "flipped.png")
    damaged = bytearray((folder / "flipped.png").read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    (folder / "flipped.png").write_bytes(damaged)
    (folder / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    for name in ("half.jpg", "half.png", "half.bmp"):
        rgb.save(folder / name)
        cut(folder / name, 0.5)
    # All pixels are there, but no decoder has to accept this file.
    (folder / "no_end.jpg").write_bytes(whole[:-2])
    (folder / "empty.jpg").touch()
    (data / "val" / "class_0" / "empty.png").touch()
    for name, mode in (
        ("gray.jpg", "L"),
        ("cmyk.jpg", "CMYK"),
        ("palette.png", "P"),
        ("alpha.png", "RGBA"),
    ):
        rgb.convert(mode).save(folder / name)
    rgb.rotate(90).convert("P").save(folder / "palette.gif")
    Image.fromarray(np.linspace(0, 65535, 2500).reshape(50, 50).astype(np.uint16)).save(
        folder / "deep_gray.png"
    )
    png_of_16_bits(folder / "deep_rgb.png")
    Image.fromarray(natural_image(2, 90, 200)).save(folder / "wide.jpg")
    rgb.convert("L").resize((100, 50)).save(folder / "wide_gray.png")
    (data / "val" / "class_1" / "leak.jpg").write_bytes(whole)
    (folder / "twin.JPEG").write_bytes(whole)
    (folder / "notes.txt").touch()
    names = {
        "corrupt": {"text.jpg", "flipped.png", "dangling.jpg"},
        "truncated": {"header_only.jpg", "half.jpg", "half.png", "half.bmp", "no_end.jpg"},
        "empty": {"empty.jpg", "../../val/class_0/empty.png"},
        "duplicate": {"twin.JPEG", "../../val/class_1/leak.jpg"},
        "not_rgb": {
            *("gray.jpg", "cmyk.jpg", "palette.png", "palette.gif", "alpha.png"),
            *("deep_gray.png", "deep_rgb.png", "wide_gray.png"),
        },
        "over_large": {"wide.jpg", "wide_gray.png"},
    }
    under = {
        k: {p.removeprefix("../../") if ".." in p else f"train/class_1/{p}" for p in v}
        for k, v in names.items()
    }
    return data, under


def test_every_kind_of_damage_is_found_under_its_name(planted, tmp_path):
    data, expected = planted
    code, result = run(data, "--report", str(tmp_path / "report.json"))
    assert {kind: set(paths) for kind, paths in result["paths"].items()} == expected
    assert result["counts"] == {kind: len(paths) for kind, paths in expected.items()}
    assert code == 1 and result["bad"] == 10 and result["images"] == 33
    report = json.loads((tmp_path / "report.json").read_text())
    assert {kind: set(paths) for kind, paths in report["paths"].items()} == expected
    assert (
        report["paths"]["duplicate"]["val/class_1/leak.jpg"]
        == "same bytes as train/class_0/000.jpg"
    )
    assert report["paths"]["not_rgb"]["train/class_1/deep_rgb.png"] == "RGB, 16 bits"
    assert report["paths"]["over_large"]["train/class_1/wide.jpg"] == "200x90 px"


def test_fix_repairs_or_moves_away_keeps_all_originals_and_a_second_run_is_clean(planted):
    data, expected = planted
    before = {p.relative_to(data): p.read_bytes() for p in data.rglob("*.*") if p.is_file()}
    pixels = {
        name: read_rgb(data / "train" / "class_1" / name)
        for name in ("gray.jpg", "deep_gray.png", "alpha.png")
    }
    code, result = run(data, "--fix")
    # No pixel is left of the file with only a header.
    moved = expected["corrupt"] | expected["empty"] | {"train/class_1/header_only.jpg"}
    repaired = (expected["truncated"] | expected["not_rgb"] | expected["over_large"]) - moved
    kept = data / ".rsa-fast" / "replaced"
    assert {str(p.relative_to(kept)) for p in kept.rglob("*.*")} == moved | repaired
    assert {path for path in moved | repaired if not (data / path).exists()} == moved
    assert (code, result["repaired"], result["moved_away"]) == (0, len(repaired), len(moved))
    assert all(
        (kept / path).read_bytes() == before[Path(path)]
        for path in moved | repaired
        if "dangling" not in path
    )
    assert (kept / "train" / "class_1" / "dangling.jpg").is_symlink()
    assert all(
        (data / path).read_bytes() == content
        for path, content in before.items()
        if str(path) not in moved | repaired
    )
    code, again = run(data)
    assert code == 0 and again["images"] == result["images"] - len(moved)
    assert again["counts"] == dict.fromkeys(expected, 0) | {"duplicate": 2}
    folder = data / "train" / "class_1"
    # A PNG loses nothing.
    assert (read_rgb(folder / "deep_gray.png") == pixels["deep_gray.png"]).all()
    assert (read_rgb(folder / "alpha.png") == pixels["alpha.png"]).all()
    assert np.abs(read_rgb(folder / "gray.jpg").astype(int) - pixels["gray.jpg"]).mean() < 1.5
    top = read_rgb(folder / "half.png")[:15].astype(int)
    assert (top == natural_image(1, 48, 60)[:15]).all()  # These rows could still be decoded.
    height, width = read_rgb(folder / "wide.jpg").shape[:2]
    assert height * width <= LIMIT and abs(width / height - 200 / 90) < 0.05
    # These are all images except for val's.
    assert len(open_source(data, "pretrain").manifest) == again["images"] - 6 + 1


def test_an_image_too_large_for_training_is_bad_and_reduced(tmp_path, monkeypatch, recwarn):
    # As 179 million pixels, which PIL refuses, and half of them, of which it warns.
    for module in (
        "rsa_fast.tools.verify",
        "rsa_fast.pipelines.scan",
        "rsa_fast.pipelines.manifest",
    ):
        monkeypatch.setattr(f"{module}.MAX_PIXELS", 10_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    sizes = {"huge.jpg": (90, 200), "huge.png": (90, 200), "warned.png": (60, 100)}
    for name, size in sizes.items():
        Image.fromarray(natural_image(0, *size)).save(tmp_path / name)
    Image.new("L", (500, 100)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="3 of 4 files"):
        open_source(tmp_path, "pretrain")
    code, result = run(tmp_path)
    assert (code, result["bad"], result["paths"]["corrupt"]) == (1, 3, ["bomb.png"])
    assert set(result["paths"]["over_large"]) == sizes.keys()
    code, result = run(tmp_path, "--fix")
    assert (code, result["repaired"], result["moved_away"]) == (0, 3, 1)
    for name, (height, width) in sizes.items():
        small = read_rgb(tmp_path / name)
        assert LIMIT * 0.9 < small.shape[0] * small.shape[1] <= LIMIT, name
        expected = Image.fromarray(natural_image(0, height, width)).resize(
            small.shape[1::-1], Image.Resampling.LANCZOS
        )
        assert np.abs(small.astype(int) - np.asarray(expected)).mean() < 6, name
    assert run(tmp_path)[0] == 0
    # From Python 3.12 on, multiprocessing warns when it forks a process that has threads.
    assert not [w for w in recwarn if "is multi-threaded, use of fork()" not in str(w.message)]


def test_a_repaired_image_keeps_its_orientation(tmp_path):
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = 6
    for name in ("a.jpg", "b.png"):
        Image.fromarray(natural_image(0, 90, 200)).save(tmp_path / name, exif=tags)
    assert run(tmp_path, "--fix")[1]["repaired"] == 2
    source = open_source(tmp_path, "pretrain", exif_orientation=True)
    assert source.oriented == 2 and (source.manifest.sizes == [[95, 42]] * 2).all()


def test_deep_images_are_bad_where_their_range_is_unknown(tmp_path):
    floats = Image.fromarray(np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20))
    floats.save(tmp_path / "unknown.tif")
    floats.save(tmp_path / "declared.tif", tiffinfo={341: 1.0})
    code, result = run(tmp_path, "--report", str(tmp_path / "report.json"))
    assert code == 1 and result["paths"]["corrupt"] == ["unknown.tif"]
    detail = json.loads((tmp_path / "report.json").read_text())["paths"]["corrupt"]["unknown.tif"]
    assert "its values are 0 to 1, but 0 to 255 would be shown" in detail
    assert result["paths"]["not_rgb"] == ["declared.tif"]


def test_a_second_fix_does_not_overwrite_what_the_first_one_kept(tmp_path):
    for i in range(2):
        Image.fromarray(natural_image(i, 20, 20)).convert("L").save(tmp_path / "a.png")
        assert run(tmp_path, "--fix")[1]["repaired"] == 1
    kept = tmp_path / ".rsa-fast" / "replaced"
    first, second = (np.asarray(Image.open(kept / name)) for name in ("a.png", "a.png.1"))
    assert (first == np.asarray(Image.fromarray(natural_image(0, 20, 20)).convert("L"))).all() and (
        first != second
    ).any()


def test_the_originals_of_class_folders_are_kept_beside_them(tmp_path):
    data = tmp_path / "photos"
    for number, name in enumerate(("a/1.png", "b/2.png", "b/3.png")):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(natural_image(number, 20, 20)).save(data / name)
    (data / "b" / "3.png").write_bytes(b"")
    assert run(data, "--fix")[1]["moved_away"] == 1
    assert (tmp_path / "photos.replaced" / "b" / "3.png").is_file()
    assert [Path(path).name for path, _ in ImageFolder(data).samples] == ["1.png", "2.png"]
    assert run(data)[1]["images"] == 2


def test_notes_alone_are_not_bad_and_a_flat_folder_is_read(tmp_path):
    Image.fromarray(natural_image(0, 20, 20)).convert("L").save(tmp_path / "gray.png")
    code, result = run(tmp_path)
    assert (
        code == 0
        and result["counts"]["not_rgb"] == 1
        and (result["bad"], result["images"]) == (0, 1)
    )


def test_fix_does_not_reach_through_links(tmp_path):
    data = write_folder(tmp_path / "data", {"train": 2})
    (data / "train" / "class_0" / "000.jpg").write_bytes(b"")
    (tmp_path / "subset" / "train").mkdir(parents=True)
    (tmp_path / "subset" / "train" / "class_0").symlink_to(data / "train" / "class_0")
    assert run(tmp_path / "subset")[1]["paths"]["empty"] == ["train/class_0/000.jpg"]
    result = invoke(main, tmp_path / "subset", "--fix")
    assert result.exit_code == 1 and "links lead to 1 file(s) to fix outside" in result.output
    assert (data / "train" / "class_0" / "000.jpg").exists() and not (
        tmp_path / "subset" / ".rsa-fast"
    ).exists()


@pytest.mark.parametrize(
    ("convert", "file"), [(to_ffcv, "train.beton"), (to_dali, "train/shard-000000.tar")]
)
def test_a_damaged_sample_of_a_converted_set_is_named(tmp_path, convert, file):
    write_folder(tmp_path / "images", {"train": 4, "val": 1})
    packed = tmp_path / "packed"
    options = ["--workers", "1", *["--write-mode", "passthrough"] * (convert is to_ffcv)]
    converted = invoke(convert, tmp_path / "images", packed, *options)
    assert converted.exit_code == 0, converted.output
    assert run(packed)[:2] == (
        0,
        {
            "path": str(packed),
            "images": 10,
            "bad": 0,
            "counts": {"corrupt": 0},
            "paths": {"corrupt": []},
        },
    )
    image = open_source(packed, "pretrain").encoded(5)
    stored = (packed / file).read_bytes()
    (packed / file).write_bytes(stored.replace(image, image[:80] + bytes(len(image) - 80)))
    code, result = run(packed)
    assert code == 1 and result["paths"]["corrupt"] == ["pretrain/5"]


def test_a_converted_set_is_read_through_its_source(tmp_path, monkeypatch):
    def opened(data: Path, split: str) -> Source:
        pixels = np.zeros((20 if split == "pretrain" else 5, 8, 9, 3), np.uint8)

        def read(sample: int) -> np.ndarray:
            if split == "test" and sample == 3:
                raise ValueError("cannot decode image 3")
            return pixels[sample, : 7 if sample == 11 else 8]

        return Source(array_manifest(split, pixels, np.zeros(len(pixels)), ("a",)), read)

    for name in ("train", "val"):
        (tmp_path / f"{name}.beton").touch()
    monkeypatch.setattr("rsa_fast.tools.verify.open_source", opened)
    code, result = run(tmp_path, "--report", str(tmp_path / "report.json"))
    assert code == 1 and (result["images"], result["bad"]) == (25, 2)
    assert json.loads((tmp_path / "report.json").read_text())["paths"]["corrupt"] == {
        "pretrain/11": "decodes to (7, 9) px (height, width), but has (8, 9) in the manifest",
        "test/3": "cannot decode image 3",
    }
    refused = invoke(main, tmp_path, "--fix")
    assert refused.exit_code == 1 and "then convert again" in refused.output


def test_a_folder_without_images_is_an_error(tmp_path):
    result = invoke(main, tmp_path)
    assert result.exit_code == 1 and "no images in" in result.output
