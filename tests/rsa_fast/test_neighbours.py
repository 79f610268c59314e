"""`rsa-fast neighbours`: the nearest are the nearest, the page is whole and needs no network."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rsa_fast
from rsa_fast.cli import main
from rsa_fast.evaluation.embed import embed, read_embeddings
from rsa_fast.insight import neighbours as module
from rsa_fast.insight.neighbours import nearest_rows, same_class
from rsa_fast.pipelines.layouts import open_source
from tests.helpers import invoke, result_of, write_folder
from tests.rsa_fast.browser import needs_browser, title_after
from tests.tiny_runs import write_untrained_run


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    return write_untrained_run(tmp_path_factory.mktemp("runs") / "a", folder)


class Page(HTMLParser):
    """The rows of images of a page: title, source, mark and caption of each image."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: list[list[dict]] = []
        self.tags: list[tuple[str, dict]] = []
        self.in_caption = False
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append((tag, values))
        if values.get("class") == "row":
            self.rows.append([])
        elif tag == "figure":
            self.rows[-1].append({"title": values["title"]})
        elif tag == "img" and "src" in values:
            self.rows[-1][-1] |= {"src": values["src"], "same": values.get("class") == "same"}
        self.in_caption = tag == "figcaption"

    def handle_data(self, data):
        if self.in_caption:
            self.rows[-1][-1]["caption"] = data

    def handle_endtag(self, tag):
        self.in_caption = False


def test_the_nearest_rows_are_those_of_a_loop(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ROWS", 7)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 6)).astype(np.float32)
    features[5] = 0  # It has no direction, and a cosine of 0 with every other.
    queries = np.array([0, 13, 39])
    found, cosines = nearest_rows(features, queries, 5)
    for query, own, values in zip(queries.tolist(), found.tolist(), cosines.tolist(), strict=True):
        scored = []
        for other, row in enumerate(features.tolist()):
            if other != query:
                lengths = math.hypot(*features[query].tolist()) * math.hypot(*row)
                inner = sum(a * b for a, b in zip(features[query].tolist(), row, strict=True))
                scored.append((-inner / max(lengths, 1e-12), other))
        expected = sorted(scored)[:5]
        assert own == [other for _, other in expected]
        assert values == pytest.approx([-cosine for cosine, _ in expected], abs=1e-6)


def test_there_are_no_more_neighbours_than_other_rows():
    found, _ = nearest_rows(np.eye(3, dtype=np.float32), np.array([1]), 8)
    assert sorted(found[0].tolist()) == [0, 2]


def test_the_share_of_the_same_class_and_its_chance():
    labels = np.array([0, 0, 0, 1, 1, -1])
    found = np.array([[1, 3], [4, 0], [0, 1]])
    # Of the queries 0, 3 and 5, the last has no class: 1 of 2 and 1 of 2 are of the same.
    assert same_class(labels, np.array([0, 3, 5]), found) == (50.0, 30.0)
    assert same_class(np.full(6, -1), np.array([0, 3, 5]), found) == (None, None)


def test_the_page_shows_the_nearest_images_and_all_in_a_map(run, folder, tmp_path):
    out = tmp_path / "nn.html"
    words = ["neighbours", "--checkpoint", run, "--out", out, "--queries", 3, "--nearest", 4]
    done = invoke(main, *words)
    result = result_of(done)
    assert (result["images"], result["queries"], result["nearest"]) == (40, 3, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["nn.html"]  # no embeddings are left

    embed(run, folder, tmp_path / "emb.npy")
    rows = read_embeddings(tmp_path / "emb.npy")
    source, page = open_source(folder, "pretrain"), Page(out)
    assert len(page.rows) == 3 and all(len(row) == 5 for row in page.rows)
    same = []
    for shown in page.rows:
        samples = [rows.filenames.index(figure["title"].split(", ")[0]) for figure in shown]
        found, cosines = nearest_rows(rows.features, np.array(samples[:1]), 4)
        assert samples[1:] == found[0].tolist()
        for sample, figure in zip(samples, shown, strict=True):
            kind, data = figure["src"].split(",")
            assert kind == "data:image/jpeg;base64"
            picture = Image.open(io.BytesIO(base64.b64decode(data)))
            wanted = Image.fromarray(source.read(sample)).resize(picture.size, 2)
            assert np.abs(np.asarray(picture, int) - np.asarray(wanted, int)).mean() < 8
            assert figure["title"].endswith(f"class_{rows.labels[sample]}")
        assert [figure["caption"].split()[0] for figure in shown[1:]] == [
            f"{cosine:.3f}" for cosine in cosines[0]
        ]
        of_class = [rows.labels[sample] == rows.labels[samples[0]] for sample in samples[1:]]
        assert [figure["same"] for figure in shown] == [False, *of_class]
        same += of_class
    assert result["same_class_pct"] == pytest.approx(100 * np.mean(same), abs=0.01)
    assert result["chance_pct"] == pytest.approx(100 * 19 / 39, abs=0.01)

    # The map has all images, each with a colour of its class, its name and its picture.
    circles = [values for tag, values in page.tags if tag == "circle"]
    points = json.loads(re.search(r"^const points = (.*);$", page.text, re.M)[1])
    assert result["map_points"] == len(circles) == len(points) == 40
    names = [text.split(": ") for text, _ in points]
    assert names == [[f"class_{rows.labels[i]}", rows.filenames[i]] for i in range(40)]
    by_class = {(name, circle["fill"]) for (name, _), circle in zip(names, circles, strict=True)}
    assert len(by_class) == 2
    assert (
        Image.open(io.BytesIO(base64.b64decode(points[0][1].split(",")[1]))).size
        == (module.HOVER_PX,) * 2
    )
    assert "All 40 images" in page.text


def test_the_page_needs_nothing_else(run, folder, tmp_path):
    out = tmp_path / "nn.html"
    rsa_fast.neighbours(run, folder, out, points=10)
    page = Page(out)
    assert "10 of the 40 images, chosen by seed 0" in page.text
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|\ssrc=\"(?!data:)", page.text)
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "base"}
    assert not [values for _, values in page.tags if "href" in values]


@needs_browser
def test_the_map_shows_the_image_below_the_pointer(run, folder, tmp_path):
    rsa_fast.neighbours(run, folder, tmp_path / "nn.html", queries=1)
    script = """
    const box = circles[7].getBoundingClientRect(), x = box.x + box.width / 2 + 1;
    svg.dispatchEvent(new PointerEvent("pointermove", { clientX: x, clientY: box.y + 4 }));
    const image = tip.querySelector("img"), text = tip.querySelector("span").textContent;
    const found = points.findIndex(point => point[0] === text && point[1] === image.src);
    const shows = [found, shown, tip.style.display, circles[7].getAttribute("stroke")];
    svg.dispatchEvent(new PointerEvent("pointermove", { clientX: -99, clientY: -99 }));
    document.title = [...shows, tip.style.display, circles[7].getAttribute("stroke")];
    """
    assert title_after(tmp_path / "nn.html", script) == "7,7,block,currentColor,none,"


def test_the_seed_decides_what_is_shown(run, folder, tmp_path):
    texts = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"{number}.html"
        rsa_fast.neighbours(run, folder, out, queries=4, points=0, seed=seed)
        texts.append(out.read_text())
    assert texts[0] == texts[1] != texts[2] and "<svg" not in texts[0]


@pytest.mark.parametrize("suffix", [".npz", ".csv"])
def test_embeddings_give_the_page_of_their_checkpoint(run, tmp_path, suffix):
    data = write_folder(tmp_path / "data", {"train": 6})
    rsa_fast.neighbours(run, data, tmp_path / "a.html")
    emb = tmp_path / f"emb{suffix}"
    embed(run, data, emb)
    rsa_fast.neighbours(None, None, tmp_path / "b.html", embeddings=emb)
    assert (tmp_path / "a.html").read_text() == (tmp_path / "b.html").read_text()

    # The images were moved, and then changed.
    data.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="no folder"):
        rsa_fast.neighbours(None, None, tmp_path / "c.html", embeddings=emb)
    rsa_fast.neighbours(None, tmp_path / "moved", tmp_path / "c.html", embeddings=emb)
    assert (tmp_path / "c.html").read_text() == (tmp_path / "b.html").read_text()
    (tmp_path / "moved" / "train" / "class_0" / "000.jpg").unlink()
    with pytest.raises(ValueError, match="are not those of the embeddings"):
        rsa_fast.neighbours(None, tmp_path / "moved", tmp_path / "c.html", embeddings=emb)


def test_file_names_are_text_and_not_markup(run, tmp_path):
    data = tmp_path / "data"
    for name in ("</script><b>", "a&b"):
        folder = write_folder(tmp_path / "one", {"train": 3}, classes=1) / "train" / "class_0"
        (data / "train").mkdir(parents=True, exist_ok=True)
        folder.rename(data / "train" / name.replace("/", "_"))
        (tmp_path / "one" / "train").rmdir()
    rsa_fast.neighbours(run, data, tmp_path / "nn.html", queries=6)
    page = Page(tmp_path / "nn.html")
    assert not [tag for tag, _ in page.tags if tag == "b"]
    assert {row[0]["title"].split(", ")[1] for row in page.rows} == {"<_script><b>", "a&b"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": None}, "give either --checkpoint, or the --embeddings"),
        ({"embeddings": "emb.npz"}, "give either --checkpoint, or the --embeddings"),
        ({"out": "nn.png"}, "but the name must end in .html"),
        ({"checkpoint": None, "embeddings": "emb.npz"}, "no emb.npz: rsa-fast embed writes"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    arguments = {"checkpoint": "run", "data": None, "out": "nn.html"} | options
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace(".", r"\.")):
        rsa_fast.neighbours(**arguments)


def test_a_map_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"-m pip install scikit-learn, or leave it out"):
        rsa_fast.neighbours("run", None, "nn.html")
