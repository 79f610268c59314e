"""A page that shows which images an encoder finds similar: nearest neighbours and a map.

    neighbours("runs/a", None, "nn.html")          # for the images that the run was trained on
    neighbours(None, None, "nn.html", embeddings="emb.npz")

Similarity is the cosine of two images' features. The map is t-SNE of their first principal
components. The page is one HTML file that contains the images, so it loads nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from rsa_fast.evaluation.embed import Embeddings, embed, read_embeddings, valid
from rsa_fast.evaluation.features import BLOCK_ROWS
from rsa_fast.insight.page import Picture, data_url, html_page, picture_row
from rsa_fast.pipelines import Source, open_source
from rsa_fast.pipelines.files import write_text
from rsa_fast.pipelines.layouts import Data
from rsa_fast.pipelines.machine import PIP

log = logging.getLogger("rsa_fast")

COMPONENTS = 50  # the number of components of PCA, before t-SNE
TILE_PX = 112  # the side of an image in the rows
HOVER_PX = 80  # the side of an image that the map shows
LEGEND_CLASSES = 40  # with more classes, the colours would be too similar

MAP = """<h2>Map</h2>
<p>{about}</p>
<div id="map" style="position:relative; max-width:900px">
<svg viewBox="0 0 1000 {height}" style="width:100%">{circles}</svg>
<div id="tip" class="box"><img alt=""><span></span></div></div>
{legend}
<style>
#tip {{ position: absolute; pointer-events: none; display: none; padding: 4px; font-size: 11px;
  max-width: 180px; overflow-wrap: anywhere; z-index: 1 }}
#tip img {{ display: block }} .legend {{ columns: 8em auto; font-size: 12px; max-width: 900px }}
</style>
"""
SCRIPT = """
const points = {points};
const map = document.getElementById("map"), tip = document.getElementById("tip");
const svg = map.querySelector("svg"), circles = [...svg.querySelectorAll("circle")];
let shown = null;
function show(event) {{
  const box = svg.getBoundingClientRect(), scale = 1000 / box.width;
  const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
  let nearest = null, least = (14 * scale) ** 2;
  circles.forEach((circle, i) => {{
    const distance = (circle.cx.baseVal.value - x) ** 2 + (circle.cy.baseVal.value - y) ** 2;
    if (distance < least) {{ least = distance; nearest = i; }}
  }});
  if (shown !== null) circles[shown].removeAttribute("stroke");
  shown = nearest;
  tip.style.display = nearest === null ? "none" : "block";
  if (nearest === null) return;
  circles[nearest].setAttribute("stroke", "currentColor");
  const [text, image] = points[nearest], left = event.clientX - box.left;
  tip.querySelector("img").src = image;
  tip.querySelector("span").textContent = text;
  tip.style.left = Math.max(0, left > box.width - 200 ? left - 200 : left + 16) + "px";
  tip.style.top = (event.clientY - box.top + 16) + "px";
}}
svg.addEventListener("pointermove", show);
svg.addEventListener("pointerdown", show);
"""


def neighbours(
    checkpoint: str | Path | None,
    data: Data | None,
    out: str | Path,
    *,
    embeddings: str | Path | None = None,
    queries: int = 16,
    nearest: int = 8,
    points: int = 2000,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Write the page `out` about the images in `data`, from an encoder or a file of `embed`.

    `queries` images are chosen at random by `seed`, and each is shown with its `nearest` nearest
    neighbours. The map has up to `points` images, which are also chosen at random. With 0 there is
    no map. `embed` computes the features of `checkpoint`, with its `options`. Without `data`, the
    images are those that `embed` chooses. With a file `embeddings`, the images are those of the
    file. `data` gives their place if they were moved.

    Returns `out` and the numbers of images, queries and map points. `same_class_pct` is the
    percentage of nearest images that have their query's class, and `chance_pct` is the percentage
    for random images. Both are None without classes.

    Raises ValueError if both or none of `checkpoint` and `embeddings` are given, if `out` does not
    end in .html, if scikit-learn is missing for the map, and if the images are no longer those of
    the embeddings.
    """
    out = Path(out)
    if (checkpoint is None) == (embeddings is None):
        raise ValueError("give either --checkpoint, or the --embeddings that rsa-fast embed wrote")
    if out.suffix != ".html":
        raise ValueError(f"this is a web page: found --out {out}, but the name must end in .html")
    if points and find_spec("sklearn") is None:
        raise ValueError(
            f"the map needs scikit-learn: {PIP} install scikit-learn, or leave it out: --points 0"
        )
    if embeddings is not None:
        return write_page(read_embeddings(embeddings), data, out, queries, nearest, points, seed)
    assert checkpoint is not None
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=".neighbours-") as folder:
        path = Path(folder) / "embeddings.npy"
        embed(checkpoint, data, path, **options)
        return write_page(read_embeddings(path), None, out, queries, nearest, points, seed)


def write_page(
    rows: Embeddings,
    data: Data | None,
    out: Path,
    queries: int,
    nearest: int,
    points: int,
    seed: int,
) -> dict[str, Any]:
    """Write the page and return the result of `neighbours`."""
    count, result = len(rows.features), rows.result
    generator = np.random.default_rng(seed)
    asked = np.sort(generator.choice(count, min(queries, count), replace=False))
    mapped = np.sort(generator.choice(count, min(points, count), replace=False))
    pictures = Pictures(rows, open_images(result, data))
    of_classes = f" in {len(rows.classes):,} classes" if rows.classes else ""
    sheet, shown = nearest_html(rows, pictures, asked, nearest, seed, "the others")
    title = f"Neighbours by {Path(result['checkpoint']).name}"
    summary = (
        f"{count:,} images{of_classes} from {', '.join(result['data'])}, by "
        f"{result['checkpoint']}: {result['dim']:,} features of {result['test_transform']}."
    )
    drawn, script = draw_map(rows, pictures, mapped, seed) if len(mapped) > 2 else ("", "")
    body = f"<h1>{escape(valid(title))}</h1>\n<p>{escape(valid(summary))}</p>\n{sheet}{drawn}"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, html_page(valid(title), body, script))
    return {
        "out": str(out),
        "images": count,
        "queries": len(asked),
        "map_points": len(mapped) if len(mapped) > 2 else 0,
        **shown,
    }


def nearest_html(
    rows: Embeddings, pictures: Pictures, asked: np.ndarray, nearest: int, seed: int, among: str
) -> tuple[str, dict[str, Any]]:
    """HTML of the rows `asked` with their nearest rows, and a part of the result of `neighbours`.

    `seed` chose the rows, and `among` describes the images that were searched.
    """
    matches, cosines = nearest_rows(rows.features, asked, nearest)
    pictures.read({*asked.tolist(), *matches.ravel().tolist()}, TILE_PX)
    same, chance = same_class(rows.labels, asked, matches)
    about = (
        f"{len(asked)} images, chosen by seed {seed}, each with its {matches.shape[1]} nearest "
        f"among {among}. The number below an image is the cosine of their features."
    )
    if same is not None:
        about += (
            f" A green frame means that an image has the class of the first one. {same:.1f}% of "
            f"the nearest images have that class. Of random images, {chance:.1f}% would have it."
        )
    lines = (
        row_of_images(rows, pictures, query, own.tolist(), cosine.tolist())
        for query, own, cosine in zip(asked.tolist(), matches, cosines, strict=True)
    )
    shown = {"nearest": matches.shape[1], "same_class_pct": same, "chance_pct": chance}
    return f"<h2>Nearest images</h2>\n<p>{about}</p>\n{''.join(lines)}", shown


def nearest_rows(
    features: np.ndarray, queries: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The rows nearest to the `queries` `(Q,)` by cosine, and the cosines, `(Q, count)` each.

    The nearest comes first. A query is not its own neighbour. The result has fewer columns if there
    are fewer other rows.
    """
    count = min(count, len(features) - 1)
    query_features = normalised(features[queries])
    cosines = np.full((len(queries), count), -np.inf, np.float32)
    nearest = np.zeros((len(queries), count), np.int64)
    for first in range(0, len(features), BLOCK_ROWS):
        block = query_features @ normalised(features[first : first + BLOCK_ROWS]).T  # (Q, rows)
        ids = np.arange(first, first + block.shape[1])
        block[queries[:, None] == ids] = -np.inf
        both = np.concatenate([cosines, block], 1)
        both_ids = np.concatenate([nearest, np.broadcast_to(ids, block.shape)], 1)
        order = np.argsort(-both, 1, kind="stable")[:, :count]
        cosines, nearest = (np.take_along_axis(x, order, 1) for x in (both, both_ids))
    return nearest, cosines


def normalised(features: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return np.asarray(features / np.maximum(lengths, 1e-12))


def same_class(
    labels: np.ndarray, queries: np.ndarray, nearest: np.ndarray
) -> tuple[float, float] | tuple[None, None]:
    """The percentage of `nearest` rows, and of all other rows, with their query's label.

    Queries without a label do not count.
    """
    labelled = labels[queries] >= 0
    if not labelled.any() or not nearest.size:
        return None, None
    own = labels[queries][labelled]
    same = (labels[nearest[labelled]] == own[:, None]).mean()
    others = [(np.count_nonzero(labels == label) - 1) / (len(labels) - 1) for label in own]
    return round(100 * float(same), 2), round(100 * float(np.mean(others)), 2)


def open_images(result: dict[str, Any], data: Data | None) -> Source:
    """The images of embeddings, from the `result` that `embed` wrote beside them.

    `data` is their place if they were moved. Raises ValueError if other images are there.
    """
    place = data if data is not None else result["data"]
    source = open_source(
        place,
        result["split"],
        val_fraction=result["val_fraction"],
        unlabelled=result["unlabelled"],
        on_bad_image="skip",
        exif_orientation=result["exif_orientation"],
    )
    if source.manifest.fingerprint != result["data_fingerprint"]:
        raise ValueError(
            f"the images in {source.where} are not those of the embeddings: run rsa-fast embed "
            "again, or give their place by --data"
        )
    return source


class Pictures:
    """Small JPEGs of the images of rows, as data URLs."""

    def __init__(self, rows: Embeddings, source: Source) -> None:
        self.rows, self.source = rows, source
        self.small: dict[tuple[int, int], str] = {}  # the keys are a row and a side in pixels

    def read(self, rows: set[int], side_px: int) -> None:
        """Make the pictures of `rows`. Threads decode the images."""
        names = {self.rows.filenames[row]: row for row in rows}
        paths = self.source.manifest.paths
        # Images that could not be read have no row, so rows and sample ids differ.
        samples = {
            names[name]: sample
            for sample, name in enumerate(paths or map(str, range(len(self.source.manifest))))
            if name in names
        }

        def picture(row: int) -> str:
            image = Image.fromarray(self.source.read(samples[row]))
            square = ImageOps.fit(image, (side_px, side_px), Image.Resampling.BILINEAR)
            return data_url(square, "JPEG")

        ordered = sorted(rows)
        with ThreadPoolExecutor() as pool:
            for row, text in zip(ordered, pool.map(picture, ordered), strict=True):
                self.small[row, side_px] = text

    def __getitem__(self, key: tuple[int, int]) -> str:
        return self.small[key]


def class_name(rows: Embeddings, row: int) -> str:
    label = rows.labels[row]
    return valid(rows.classes[label]) if label >= 0 else ""


def row_of_images(
    rows: Embeddings, pictures: Pictures, query: int, nearest: list[int], cosines: list[float]
) -> str:
    """An image and its nearest ones, with their cosines, as HTML."""
    shown = []
    for row, cosine in zip([query, *nearest], ["", *(f"{x:.3f}" for x in cosines)], strict=True):
        name = class_name(rows, row)
        title = ", ".join(filter(None, (valid(rows.filenames[row]), name)))
        caption = f"{cosine} {name}".strip() or "query"
        mark = ""
        if row != query:
            mark = "same" if rows.labels[row] == rows.labels[query] >= 0 else "other"
        shown.append(Picture(pictures[row, TILE_PX], caption, title, mark))
    return picture_row(shown)


def map_positions(features: np.ndarray, seed: int) -> np.ndarray:
    """The positions `(N, 2)` float32 that t-SNE gives to features `(N, D)` by their cosines."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rows = normalised(features)
    components = min(COMPONENTS, *rows.shape)
    reduced = PCA(components, random_state=seed).fit_transform(rows)
    perplexity = min(30.0, (len(rows) - 1) / 3)  # 30 is the usual value
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed)
    return np.asarray(tsne.fit_transform(reduced), np.float32)


def colours(count: int) -> Sequence[str]:
    """Colours for `count` classes. Neighbours in the list also differ in lightness."""
    return [f"hsl({360 * i / count:.0f} 65% {(45, 62)[i % 2]}%)" for i in range(count)] or ["#888"]


def draw_map(
    rows: Embeddings, pictures: Pictures, mapped: np.ndarray, seed: int
) -> tuple[str, str]:
    """The map of the rows `mapped` as HTML, and its script, which shows images on hover."""
    positions = map_positions(rows.features[mapped], seed)
    low, high = positions.min(0), positions.max(0)
    places = 15 + (positions - low) * 970 / max(float((high - low).max()), 1e-12)
    pictures.read(set(mapped.tolist()), HOVER_PX)
    palette = colours(len(rows.classes))
    circles, points = [], []
    for row, (x, y) in zip(mapped.tolist(), places.tolist(), strict=True):
        label = rows.labels[row]
        colour = palette[label] if label >= 0 else "#888"
        circles.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
        text = ": ".join(filter(None, (class_name(rows, row), valid(rows.filenames[row]))))
        points.append([text, pictures[row, HOVER_PX]])
    count = len(rows.features)
    which = f"All {count:,} images"
    if len(mapped) < count:
        which = f"{len(mapped):,} of the {count:,} images, chosen by seed {seed}"
    about = (
        f"{which}, by t-SNE of the first {min(COMPONENTS, len(mapped), rows.features.shape[1])} "
        "principal components of their features at unit length. Images that are close are "
        "similar, but distances between groups say little. Point at a dot to see its image."
    )
    legend = ""
    if 0 < len(rows.classes) <= LEGEND_CLASSES:
        items = (
            f'<div><i class="dot" style="background:{colour}"></i>{escape(valid(name))}</div>'
            for colour, name in zip(palette, rows.classes, strict=True)
        )
        legend = f'<div class="legend">{"".join(items)}</div>'
    elif rows.classes:
        about += f" There are {len(rows.classes)} classes, so some of their colours look alike."
    drawn = MAP.format(
        about=about,
        height=f"{float(places[:, 1].max()) + 15:.0f}",
        circles="".join(circles),
        legend=legend,
    )
    return drawn, SCRIPT.format(points=json.dumps(points).replace("</", "<\\/"))
