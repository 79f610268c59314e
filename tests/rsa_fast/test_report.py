from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from PIL import Image

from rsa_fast.cli import main
from rsa_fast.insight import report as module
from rsa_fast.insight.report import KNN, LOSS, draw_figure, read_runs, report
from rsa_fast.training.run_folder import try_to_report

SVG = "{http://www.w3.org/2000/svg}"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def write_run(folder, seed=0, epochs=4, parts=("loss", "weak", "aggressive"), **recipe):
    """Write a run folder of made-up numbers, with the fields of a real one."""
    rng, records = np.random.default_rng(seed), []
    for step in range(0, 10 * epochs + 1, 5):
        if step:
            values = {
                **dict.fromkeys(parts, 0),
                "embedding_std": 0,
                "images_per_s": 0,
                "wait_pct": 0,
                "lr": 0,
                "tau": 0,
            }
            records.append({"step": step, **{key: rng.random() for key in values}})
        if step % 10 == 0:
            records.append(
                {
                    "step": step,
                    "epoch": step // 10,
                    "knn_top1": 100 * rng.random(),
                    "knn20_top1": 40.0,
                }
            )
        if step % 10 == 0 and step and "weak" in parts:
            stats = {
                "effective_rank": 9.5,
                "weak_aggressive_cosine": 0.7,
                "other_image_cosine": 0.5,
            }
            counts = rng.multinomial(64, [0.05] * 20).tolist()
            records.append(
                {"step": step, "epoch": step // 10, **stats, "weak_aggressive_counts": counts}
            )
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    fields = "".join(
        f"{key}: {value}\n"
        for key, value in {"method": folder.name, "base_lr": 0.03, **recipe}.items()
    )
    (folder / "recipe.yaml").write_text(fields + "views:\n  size_px: 32\n")
    environment = {"command": ["rsa-fast", "<train>"], "packages": {"torch": "2.10.0"}, "gpus": []}
    (folder / "env.json").write_text(json.dumps(environment))
    (folder / "result.json").write_text(
        json.dumps({"step": 10 * epochs, "knn_top1": 61.25, "linear_top1": None})
    )
    return folder


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def points(folder, x, y):
    """Return the points in the order of x, read from the file itself."""
    found = {}
    for record in lines_of(folder):
        if x in record and y in record:
            found[record[x]] = record[y]
    return sorted(found.items())


class Page(HTMLParser):
    """A page's tags with their attributes, and its tables by title as rows of cells."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.tables, self.differs, self.last = [], {}, set(), ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.row = []
            self.tables[self.title].append(self.row)
        if tag in ("td", "th"):
            self.row.append("")
        self.last = tag

    def handle_endtag(self, tag):
        self.last = ""

    def handle_data(self, data):
        if self.last == "h2":
            self.title = data
            self.tables[data] = []
        elif self.last in ("td", "th"):
            self.row[-1] += data

    def table(self, title):
        return {row[0]: row[1:] for row in self.tables[title]}


def svg_of(path):
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", path.read_text(), re.DOTALL)[0])


def test_the_curves_of_the_page_are_the_records_but_for_the_axes_scale(tmp_path):
    """Every drawn path is an affine image of the points in metrics.jsonl.

    The map is the same for all lines of a panel.
    """
    folder = write_run(tmp_path / "rsa", epochs=12)
    svg = svg_of(report([folder]))
    panels = [
        group for group in svg.iter(f"{SVG}g") if re.fullmatch(r"axes_\d+", group.get("id", ""))
    ]
    # These are all panels except for beta, which this run does not have, and the histogram.
    assert len(panels) == 10
    for panel, x, keys in (
        (0, "step", LOSS.keys),
        (1, "epoch", KNN.keys),
        (6, "step", ("wait_pct",)),
    ):
        drawn = [
            np.array(re.findall(r"[-\d.]+", path.get("d")), float).reshape(-1, 2)
            for path in panels[panel].iter(f"{SVG}path")
            if path.get("clip-path") and "#b0b0b0" not in path.get("style")  # Gridlines are gray.
        ]
        values = [np.array(points(folder, x, key)) for key in keys]
        assert [len(line) for line in drawn] == [len(line) for line in values]
        for axis in (0, 1):
            pixels, numbers = (
                np.concatenate([line[:, axis] for line in lines]) for lines in (drawn, values)
            )
            scale, offset = np.polyfit(numbers, pixels, 1) if np.ptp(numbers) else (0, pixels[0])
            assert np.abs(scale * numbers + offset - pixels).max() < 1e-4
            assert scale > 0 if axis == 0 else scale <= 0  # In SVG, y grows downwards.


def test_the_histogram_by_epoch_is_the_share_of_the_recorded_counts(tmp_path):
    folder = write_run(tmp_path / "rsa")
    axes = draw_figure(read_runs([folder])).axes[-1]
    (mesh,) = axes.collections
    counts = [
        record["weak_aggressive_counts"]
        for record in lines_of(folder)
        if "weak_aggressive_counts" in record
    ]
    for epoch, bins in enumerate(counts):
        for k, count in enumerate(bins):
            assert mesh.get_array()[k, epoch] == count / 64
    corners = mesh.get_coordinates()
    assert np.allclose(corners[0, :, 0], [0.5, 1.5, 2.5, 3.5, 4.5]) and np.allclose(
        corners[:, 0, 1], np.arange(21) / 20
    )


def test_a_point_recorded_twice_is_drawn_once(tmp_path):
    folder = write_run(tmp_path / "rsa")
    with (folder / "metrics.jsonl").open("a") as file:  # as after resuming a finished run
        file.write(json.dumps({"step": 40, "epoch": 4, "knn_top1": 7.0}) + "\n")
    (line, _) = draw_figure(read_runs([folder]), (KNN,)).axes[0].lines
    assert list(line.get_xdata()) == [0, 1, 2, 3, 4] and line.get_ydata()[-1] == 7


def test_the_page_needs_nothing_else_and_runs_nothing(tmp_path):
    path = report([write_run(tmp_path / "a&b")])
    page = Page(path)
    assert path == tmp_path / "a&b" / "report.html"
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
    }
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
    text = path.read_text()
    assert (
        all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
        and "@import" not in text
    )
    assert not re.search(r"(?<!xmlns=\")(?<!xmlns:xlink=\")https?://", text)
    assert "<title>a&amp;b</title>" in text
    assert path.read_text() == report([tmp_path / "a&b"]).read_text()


def test_the_tables_hold_what_the_run_folder_does(tmp_path):
    page = Page(report([write_run(tmp_path / "rsa", wandb="true")]))
    assert page.table("Scores") == {
        "": ["rsa"],
        "step": ["40"],
        "knn_top1": ["61.25"],
        "linear_top1": ["-"],
    }
    recipe = {"method": ["rsa"], "base_lr": ["0.03"], "wandb": ["True"], "views.size_px": ["32"]}
    assert page.table("Recipe") == {"": ["rsa"], **recipe}
    assert page.table("Environment") == {
        **{"": ["rsa"], "command": ["rsa-fast <train>"]},
        **{"packages.torch": ["2.10.0"], "gpus": ["-"]},
    }


def entries(legend):
    return legend.get_texts(), legend.legend_handles


def lines_in(axes):
    # The legend's lines have no points.
    return [line for line in axes.lines if len(line.get_xdata())]


def test_several_runs_are_laid_over_each_other_and_their_differences_marked(tmp_path):
    folders = [
        write_run(tmp_path / "rsa"),
        write_run(tmp_path / "byol", 1, 6, ("loss",), pairs="AA"),
    ]
    figure = draw_figure(read_runs(folders))
    loss, knn, *_, shift = figure.axes
    colours = {
        text.get_text(): to_rgb(line.get_color())
        for text, line in zip(*entries(figure.legends[0]), strict=True)
    }
    assert colours == {"rsa": to_rgb("C0"), "byol": to_rgb("C1")}
    styles = {
        line.get_linestyle(): text.get_text()
        for text, line in zip(*entries(loss.get_legend()), strict=True)
    }
    drawn = [
        (to_rgb(line.get_color()), styles[line.get_linestyle()], list(line.get_ydata()))
        for line in lines_in(loss)
    ]
    wanted = [
        (i, key)
        for key in LOSS.keys
        for i, folder in enumerate(folders)
        if points(folder, "step", key)
    ]
    assert drawn == [
        (to_rgb(f"C{i}"), key, [y for _, y in points(folders[i], "step", key)]) for i, key in wanted
    ]
    assert len(drawn) == 4 and list(lines_in(knn)[1].get_ydata()) == [
        y for _, y in points(folders[1], "epoch", "knn_top1")
    ]
    assert shift.get_title() == "cosine of weak and aggressive view, rsa"  # BYOL has none.
    path = report(folders, tmp_path / "new" / "both.html")
    page = Page(path)
    assert page.table("Recipe") == {
        **{"": ["rsa", "byol"], "method": ["rsa", "byol"], "base_lr": ["0.03", "0.03"]},
        **{"views.size_px": ["32", "32"], "pairs": ["-", "AA"]},
    }
    marked = re.findall(r'<tr class="differs"><th>([^<]*)', path.read_text())
    assert marked == ["step", "method", "pairs"]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    folders = [write_run(tmp_path / place / "run") for place in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == [str(folder) for folder in folders]


def test_a_run_that_goes_on_has_a_report_of_what_is_there(tmp_path):
    folder = write_run(tmp_path / "rsa")
    for name in ("result.json", "recipe.yaml", "env.json"):
        (folder / name).unlink()
    assert Page(report([folder])).table("Scores") == {"": ["rsa"], "step": ["40"]}


def test_the_command_writes_the_page_and_says_where(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("rsa", "byol")]
    out = tmp_path / "both.html"
    done = CliRunner().invoke(main, ["report", *map(str, folders), "--out", str(out)])
    assert done.exit_code == 0 and json.loads(done.stdout) == {"out": str(out)}
    assert "<title>rsa, byol</title>" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rsa", "byol"), "2 runs on one page: --out says where it goes"),
        (("rsa", "--out", "page.pdf"), "wanted a name that ends in .html"),
        (("empty",), "no metrics.jsonl in"),
        (("begun",), "nothing is recorded yet in begun"),
        ((), "Missing argument"),
    ],
)
def test_bad_input_is_one_line_and_no_page(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("rsa", "byol"):
        write_run(tmp_path / name)
    for name in ("empty", "begun"):
        (tmp_path / name).mkdir()
    (tmp_path / "begun" / "metrics.jsonl").touch()
    done = CliRunner().invoke(main, ["report", *arguments])
    assert done.exit_code != 0 and message in done.output and "Traceback" not in done.output
    assert not list(tmp_path.rglob("*.html")) and not list(tmp_path.rglob("*.pdf"))


def test_a_report_that_fails_takes_nothing_from_the_run(tmp_path, monkeypatch, caplog):
    folder = write_run(tmp_path / "rsa")
    try_to_report(folder)
    assert (folder / "report.html").is_file() and caplog.text == ""
    monkeypatch.setattr(module, "draw_figure", lambda runs: 1 / 0)
    try_to_report(folder)
    message = f"no report (division by zero); once that is mended: rsa-fast report {folder}"
    assert message in caplog.text


@pytest.mark.skipif(
    not any(map(shutil.which, BROWSERS)), reason=f"none of {', '.join(BROWSERS)} is installed"
)
def test_a_browser_shows_the_page(tmp_path):
    """The screenshot has lines in the colours of both runs, and the picture of the histogram."""
    path = report(
        [write_run(tmp_path / name, seed) for seed, name in enumerate(("rsa", "byol"))],
        tmp_path / "both.html",
    )
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    options += ["--window-size=1280,1600", f"--screenshot={tmp_path / 'page.png'}"]
    subprocess.run([browser, *options, path.as_uri()], check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).reshape(-1, 3).astype(int)
    assert len(pixels) == 1280 * 1600
    for colour in (to_rgb("C0"), to_rgb("C1"), colormaps["Blues"](0.5)[:3]):
        assert (np.abs(pixels - 255 * np.array(colour)).max(1) < 20).sum() > 500
    assert (pixels == 255).all(1).mean() > 0.5


def test_the_confused_classes_are_drawn_and_the_worst_are_listed(tmp_path):
    names = ["cats", "dogs", "<owls>", "newts"]
    counts = np.array([[8, 2, 0, 0], [3, 1, 0, 1], [0, 0, 5, 0], [0, 0, 0, 0]])
    folder = write_run(tmp_path / "rsa")
    rows = [[int(i), int(j), int(counts[i, j])] for i, j in np.argwhere(counts)]
    content = {"score": "linear", "classes": names, "counts": rows}
    (folder / "confusion.json").write_text(json.dumps(content))
    page = Page(report([folder]))
    table = page.table("Classes by linear, rsa")
    assert list(table) == ["class", "dogs", "cats", "<owls>"]  # newts have no test images
    assert table["dogs"] == ["20.0", "5", "cats (3)"]
    assert table["cats"] == ["80.0", "10", "dogs (2)"]
    assert table["<owls>"] == ["100.0", "5", "-"]
    (source,) = (tag["src"] for name, tag in page.tags if name == "img")
    picture = base64.b64decode(source.partition("base64,")[2]).decode()
    texts = [node.text for node in ElementTree.fromstring(picture).iter(f"{SVG}text")]
    assert [text for text in texts if text in names] == 2 * names
    numbers = [int(text) for text in texts if text.isdigit()]
    assert numbers == counts.flatten().tolist()


def test_a_thousand_classes_make_one_picture_without_names(tmp_path):
    folder = write_run(tmp_path / "rsa")
    rows = [[i, (7 * i) % 1000, 50] for i in range(1000)]
    names = [f"n{i:08}" for i in range(1000)]
    content = {"score": "linear", "classes": names, "counts": rows}
    (folder / "confusion.json").write_text(json.dumps(content))
    path = report([folder])
    assert len(Page(path).table("Classes by linear, rsa")) == 1 + module.LISTED_CLASSES
    assert path.stat().st_size < 3e6 and "n00000999" not in path.read_text()
