from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from PIL import Image

from rsa_fast.pipelines.layouts import open_source
from rsa_fast.pipelines.order import epoch_order
from rsa_fast.tools.convert import RESIZE_FILTER
from rsa_fast.tools.to_dali import main
from tests.helpers import NO_DALI, encoded
from tests.tools.mixed import converted, digests, kept_as_they_are

convert = partial(converted, main)


def test_jpegs_are_kept_and_shuffled_by_the_seed(images, tmp_path):
    result = convert(images, tmp_path / "a")
    source, stored = open_source(images, "train"), open_source(tmp_path / "a", "train")
    order, keep = epoch_order(14, 0, 0), kept_as_they_are(source)
    assert (np.sort(order) == np.arange(14)).all() and (order != np.arange(14)).any()
    assert (stored.manifest.labels == source.manifest.labels[order]).all()
    assert (stored.manifest.sizes == source.manifest.sizes[order]).all()
    for i, original in enumerate(order):
        same = stored.encoded(i) == source.encoded(original)
        assert (
            same == keep[original]
            and np.abs(stored.read(i).astype(int) - source.read(original)).mean() < 25
        )
    assert (result["jpg"], result["raw"], result["reencoded"]) == (14, 0, 3)
    assert result["bytes"] == sum(
        path.stat().st_size for path in (tmp_path / "a" / "train").iterdir()
    )
    convert(images, tmp_path / "again")
    convert(images, tmp_path / "other", "--seed", 1)
    assert digests(tmp_path / "a") == digests(tmp_path / "again")
    other = open_source(tmp_path / "other", "train")
    assert [other.encoded(i) for i in range(14)] != [stored.encoded(i) for i in range(14)]
    assert sorted(other.encoded(i) for i in range(14)) == sorted(
        stored.encoded(i) for i in range(14)
    )


def test_the_short_side_is_reduced_never_enlarged(images, tmp_path):
    result = convert(images, tmp_path, "--short-side", 45, "--jpeg-quality", 80)
    source, stored = open_source(images, "train"), open_source(tmp_path, "train")
    kept = 0
    for i, original in enumerate(epoch_order(14, 0, 0)):
        height, width = source.manifest.sizes[original]
        if min(height, width) <= 45:
            assert (stored.manifest.sizes[i] == (height, width)).all()
            kept += stored.encoded(i) == source.encoded(original)
            continue
        size = (45, width * 45 // height) if height < width else (height * 45 // width, 45)
        assert tuple(stored.manifest.sizes[i]) == size
        resized = Image.fromarray(source.read(original)).resize(size[::-1], RESIZE_FILTER)
        assert stored.encoded(i) == encoded(np.asarray(resized), quality=80)
    assert 0 < kept < 14 and result["reencoded"] == 14 - kept


def test_dali_decodes_the_shards(images, tmp_path):
    pytest.importorskip("nvidia.dali", reason=NO_DALI)
    from nvidia.dali import fn, pipeline_def

    convert(images, tmp_path)
    stored = open_source(tmp_path, "train")

    @pipeline_def(batch_size=14, num_threads=1, device_id=None)
    def graph():
        files = {
            "paths": str(tmp_path / "train/shard-000000.tar"),
            "index_paths": str(tmp_path / "train/shard-000000.idx"),
        }
        image, label = fn.readers.webdataset(**files, ext=["jpg", "cls"])
        return fn.decoders.image(image, adjust_orientation=False), label

    pipeline = graph()
    pipeline.build()
    found, labels = pipeline.run()
    assert [int(np.asarray(text).tobytes()) for text in labels] == stored.manifest.labels.tolist()
    for i in range(14):
        assert np.abs(np.asarray(found[i]).astype(int) - stored.read(i)).mean() < 1.5
