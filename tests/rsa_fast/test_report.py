from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from html import escape
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from rsa_fast.cli import main
from rsa_fast.insight import report as module
from rsa_fast.insight.page import UNITS, Axis, Line, chart, command_line, ticks
from rsa_fast.insight.report import read_runs, report
from rsa_fast.pipelines.layouts import open_source
from rsa_fast.training.run_folder import try_to_report
from tests.helpers import invoke
from tests.rsa_fast.browser import browse, needs_browser, title_after
from tests.tiny_runs import NETWORK, expected_features, set_options, write_untrained_run

STEPS_PER_EPOCH = 10  # of write_run


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


def points(folder, key):
    """Return the points (epoch, value) in their order, read from the file itself."""
    found = {}
    for record in lines_of(folder):
        if key in record:
            found[record["step"] / STEPS_PER_EPOCH] = record[key]
    return np.array(sorted(found.items()))


class Drawn:
    """A chart of a page: its title, the names and values beside it, and its SVG."""

    def __init__(self, html):
        self.title = re.search("<h3>(.*?)</h3>", html)[1]
        self.keys = re.findall(r"</svg>([^<]*) <b>([^<]*)</b></span>", html)
        self.svg = ElementTree.fromstring(re.findall("<svg.*?</svg>", html)[-1])
        self.end, self.low, self.high = (
            float(re.search(f'data-{name}="([^"]*)"', html)[1]) for name in ("end", "low", "high")
        )

    def lines(self):
        """The style and the points of each line, in the units of the axes."""
        for path in self.svg.iter("path"):
            if path.get("class") == "line":
                xy = np.array(re.findall(r"[-\d.]+", path.get("d")), float).reshape(-1, 2) / UNITS
                y = self.high - xy[:, 1] * (self.high - self.low)
                yield path.get("style"), np.stack([self.end * xy[:, 0], y], 1)


def charts(path):
    """The charts of a page by their titles."""
    drawn = [Drawn(part) for part in path.read_text().split('<div class="chart">')[1:]]
    return {chart.title: chart for chart in drawn}


def same_points(drawn, wanted, chart):
    """Whether points are equal but for a hundred-thousandth of the axes' lengths."""
    lengths = np.array([chart.end, chart.high - chart.low])
    return drawn.shape == wanted.shape and (np.abs(drawn - wanted) <= 1e-5 * lengths).all()


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
        if self.last in ("h1", "h2", "summary"):
            self.title = data
            self.tables[data] = []
        elif self.last in ("td", "th"):
            self.row[-1] += data

    def table(self, title):
        return {row[0]: row[1:] for row in self.tables[title]}


PANELS = {
    "loss": ("loss", "weak", "aggressive"),
    "kNN top-1, %": ("knn_top1", "knn20_top1"),
    "embedding std (0: collapse)": ("embedding_std",),
    "effective rank (1: collapse)": ("effective_rank",),
    "weak-aggressive cosine": ("weak_aggressive_cosine", "other_image_cosine"),
    "its distribution": ("weak_aggressive_cosine",),
    "images/s": ("images_per_s",),
    "waiting for views, %": ("wait_pct",),
    "learning rate": ("lr",),
    "tau": ("tau",),
}


def test_the_lines_are_the_records_on_one_axis_of_epochs(tmp_path):
    folder = write_run(tmp_path / "rsa", epochs=12)
    drawn = charts(report([folder]))
    assert list(drawn) == list(PANELS)  # beta is not recorded in this run
    for title, keys in PANELS.items():
        chart = drawn[title]
        assert chart.end == 12
        lines = [line for _, line in chart.lines()]
        wanted = [points(folder, key) for key in keys]
        assert len(lines) == len(wanted) == len(chart.keys)
        for line, expected, (_, last) in zip(lines, wanted, chart.keys, strict=True):
            assert same_points(line, expected, chart)
            assert last == f"{expected[-1, 1]:.4g}"


def test_the_levels_are_chance_and_the_network_before_training(tmp_path):
    folder = write_run(tmp_path / "rsa")
    page = report([folder]).read_text()
    first = points(folder, "knn_top1")[0, 1]
    best = points(folder, "knn_top1")[points(folder, "knn_top1")[:, 1].argmax()]
    assert f">before training {first:.4g}</span>" in page and "chance" not in page
    assert f"<span>best {best[1]:.4g} at epoch {best[0]:.4g}</span>" in page
    start = {"classes": 8, "images": 3000, "steps_per_epoch": STEPS_PER_EPOCH}
    (folder / "env.json").write_text(json.dumps([{"command": ["rsa-fast"], **start}]))
    page = report([folder]).read_text()
    assert ">chance 12.5</span>" in page and "3,000 images in 8 classes" in page
    levels = [
        float(path.get("d").split()[1].partition("H")[0]) / UNITS
        for path in charts(folder / "report.html")["kNN top-1, %"].svg.iter("path")
        if path.get("class") == "level"
    ]
    high = charts(folder / "report.html")["kNN top-1, %"].high
    assert [high * (1 - level) for level in levels] == pytest.approx([12.5, first], abs=1e-3)


def test_the_distribution_by_epoch_is_the_share_of_the_recorded_counts(tmp_path):
    folder = write_run(tmp_path / "rsa")
    chart = charts(report([folder]))["its distribution"]
    (image,) = chart.svg.iter("image")
    x, y, width, height = (float(image.get(key)) for key in ("x", "y", "width", "height"))
    assert (x, width) == (0, UNITS)  # of epoch 0 to the last, epoch 4
    bottom, top = (chart.high - z / UNITS * (chart.high - chart.low) for z in (y + height, y))
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image.get("href").split(",")[1]))))
    counts = [r["weak_aggressive_counts"] for r in lines_of(folder) if "effective_rank" in r]
    rows = len(pixels)  # The lowest bins are left out if no image is in them in any epoch.
    assert (bottom, top) == pytest.approx((1 - rows / 20, 1), abs=1e-4)
    for epoch, bins in enumerate(counts):
        assert not any(bins[: 20 - rows])
        for k, count in enumerate(bins[20 - rows :]):
            alpha = pixels[rows - 1 - k, epoch, 3]
            assert abs(alpha - 255 * (count / 64) ** 0.5) <= 0.5


def test_a_point_recorded_twice_is_drawn_once(tmp_path):
    folder = write_run(tmp_path / "rsa")
    with (folder / "metrics.jsonl").open("a") as file:  # as after resuming a finished run
        file.write(json.dumps({"step": 40, "epoch": 4, "knn_top1": 7.0}) + "\n")
    chart = charts(report([folder]))["kNN top-1, %"]
    (_, line), _ = chart.lines()
    assert line[:, 0] == pytest.approx([0, 1, 2, 3, 4]) and line[-1, 1] == pytest.approx(7)


def test_every_svg_is_well_formed(tmp_path):
    """Also those of names that are markup, of one point, and of a constant value."""
    folders = [write_run(tmp_path / name, epochs=1) for name in ('<b>"&', "b")]
    text = report(folders, tmp_path / "both.html").read_text()
    found = re.findall("<svg.*?</svg>", text)
    assert len(found) > 20 and "<b>&quot;" not in text
    assert [ElementTree.fromstring(svg).tag for svg in found] == ["svg"] * len(found)
    one = chart("<i>", [Line("&", [0.5], [3.0])], Axis(1, "epoch"))
    assert "<h3>&lt;i&gt;</h3>" in one and Drawn(one).low < 3 < Drawn(one).high


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.13, 0.48, [0.1, 0.2, 0.3, 0.4, 0.5]),
        (0.996, 1, [0.996, 0.997, 0.998, 0.999, 1]),
        (-3, 212, [-50, 0, 50, 100, 150, 200, 250]),
        (0, 0, [-0.1, -0.05, 0, 0.05, 0.1]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, wanted):
    assert ticks(low, high) == pytest.approx(wanted)


def test_the_page_needs_nothing_else(tmp_path):
    path = report([write_run(tmp_path / "a&b")])
    page = Page(path)
    assert path == tmp_path / "a&b" / "report.html"
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert tag != "script" or not attributes
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/"))
    text = path.read_text()
    loading = r"https?:|//\w|url\(|@import|import\(|fetch\(|XMLHttp|WebSocket|sendBeacon"
    assert not re.search(loading, re.sub(r"data:image/\w+;base64,[^\"]*", "", text))
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


def test_fields_within_fields_have_rows_of_their_own():
    groups = [{"name": "large", "count": 2, "size_px": None}, {"name": "small", "count": 6}]
    assert dict(module.flatten({"views": {"groups": groups, "extra": None, "mean": []}})) == {
        **{"views.groups.0.name": "large", "views.groups.0.count": "2"},
        **{"views.groups.1.name": "small", "views.groups.1.count": "6"},
        **{"views.extra": "-", "views.mean": "-"},
    }


def test_several_runs_are_laid_over_each_other_and_their_differences_marked(tmp_path):
    folders = [
        write_run(tmp_path / "rsa"),
        write_run(tmp_path / "byol", 1, 6, ("loss",), pairs="AA"),
    ]
    path = report(folders, tmp_path / "new" / "both.html")
    drawn = charts(path)
    loss = drawn["loss"]
    names = ["rsa, loss", "byol, loss", "rsa, weak", "rsa, aggressive"]
    assert [name for name, _ in loss.keys] == names
    for name, (style, line) in zip(names, loss.lines(), strict=True):
        run, key = name.split(", ")
        i = ("rsa", "byol").index(run)
        assert f"var(--c{i})" in style  # the run's colour
        assert ("dasharray" in style) == (key != "loss")  # the key's style
        assert same_points(line, points(folders[i], key), loss)
    assert loss.end == 6 and "its distribution, rsa" in drawn
    assert "its distribution, byol" not in drawn  # BYOL has none.
    page = Page(path)
    assert page.table("Recipe") == {
        **{"": ["rsa", "byol"], "method": ["rsa", "byol"], "base_lr": ["0.03", "0.03"]},
        **{"views.size_px": ["32", "32"], "pairs": ["-", "AA"]},
    }
    marked = re.findall(r'<tr class="differs"><th>([^<]*)', path.read_text())
    assert marked == ["method", "pairs"]  # scores always differ


def test_runs_of_very_different_length_have_an_axis_in_percent(tmp_path):
    folders = [write_run(tmp_path / "a", 0, 2), write_run(tmp_path / "b", 1, 40)]
    chart = charts(report(folders, tmp_path / "both.html"))["kNN top-1, %"]
    assert chart.end == 100
    ends = [line[-1, 0] for _, line in chart.lines()]
    assert ends == pytest.approx([100] * 4)


def test_the_headline_has_the_scores_the_verdicts_and_the_command(tmp_path):
    folder = write_run(tmp_path / "rsa", epochs=4)
    records = [{"step": 0, "epoch": 0, "knn_top1": 30.0}]
    for step in (5, 10, 15, 20):
        record = {"step": step, "step_ms": 6000.0, "embedding_std": 0.9, "wait_pct": 2.0}
        records += [record, {"step": step, "epoch": step / 10, "knn_top1": 30.0 + step}]

    def page_of(records, **result):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "metrics.jsonl").write_text(lines)
        (folder / "result.json").write_text(json.dumps({"step": 20, "dataset": "x"} | result))
        (folder / "recipe.yaml").write_text(
            "method: rsa\narch: resnet18\nepochs: 2\nbatch_size: 8\nviews: {size_px: 32}\n"
        )
        start = {"classes": 4, "images": 83, "steps_per_epoch": 10}
        command = {"command": ["/a b/bin/rsa-fast", "train", "--data", "a b"]}
        (folder / "env.json").write_text(json.dumps([command | start]))
        text = report([folder]).read_text()
        verdicts = re.findall('<div class="(good|fair|bad)"><b>.</b> ([^<]*)</div>', text)
        return text, verdicts

    text, verdicts = page_of(records, knn_top1=50.0)
    assert "<h1>rsa on x</h1>" in text
    facts = "83 images in 4 classes · resnet18, 32 px, batch 8 · 20 of 20 steps (2 of 2 epochs)"
    assert f"{facts} · trained for 2 min" in text  # 20 steps of 6 s
    assert "<code>rsa-fast train --data &#x27;a b&#x27;</code>" in text
    assert '<span class="big">50.0</span>' in text
    assert '<div class="pale">chance 25.0 · before training 30.0</div>' in text
    assert verdicts == [
        ("good", "kNN went from 30.0 before training to 50.0 %"),
        ("good", "no collapse (standard deviation of embeddings 0.90)"),
        ("good", "the network waits for images 2.0 % of the time"),
    ]
    worse = [record | ({"knn_top1": 29.0} if "knn_top1" in record else {}) for record in records]
    worse[0] = records[0]
    worse[-2] |= {"embedding_std": 0.01}
    _, verdicts = page_of(worse, wait_pct=42.0)
    assert [kind for kind, _ in verdicts] == ["fair", "bad", "bad"]
    assert "no better than untrained" in verdicts[0][1] and "collapse" in verdicts[1][1]
    assert "rsa-fast profile finds the setting to change" in verdicts[2][1]
    text, _ = page_of(records[:5])
    assert "10 of 20 steps (1 of 2 epochs), not finished" in text


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (["/x/bin/rsa-fast", "train"], "rsa-fast train"),
        (["/x/rsa_fast/__main__.py", "train", "a b"], "python -m rsa_fast train 'a b'"),
        (["study.py", "7"], "python study.py 7"),
    ],
)
def test_the_command_is_as_one_types_it(command, wanted):
    assert command_line(command) == wanted


def test_the_pictures_are_views_and_the_nearest_by_brute_force(tmp_path, folder):
    run = write_run(tmp_path / "rsa")
    write_untrained_run(run, folder)
    text = report([run]).read_text()
    parts = text.partition("<h2>Nearest images</h2>")
    views = re.findall(r'<figure title="([^"]*)">.*?<figcaption>([^<]*)<', parts[0])
    names = ["image", "weak 1", "weak 2", "aggressive 1", "aggressive 2"]
    assert [caption for _, caption in views] == 4 * names
    assert len({title.split(":")[0] for title, _ in views}) == 4
    source = open_source(folder, "pretrain")
    features = expected_features(run, source).double().numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    paths = list(source.manifest.paths)
    rows = parts[2].partition("<h2>")[0].split('<div class="row">')[1:]
    assert len(rows) == 6
    for row in rows:
        shown = re.findall(
            r'<figure title="([^"]*), [^"]*"><img class="(\w*)".*?<figcaption>([^< ]*)', row
        )
        query, *others = [paths.index(name) for name, _, _ in shown]
        cosines = features @ features[query]
        cosines[query] = -np.inf
        nearest = sorted(range(len(paths)), key=lambda i: -cosines[i])[:8]
        assert [f"{cosines[i]:.3f}" for i in others] == [caption for _, _, caption in shown[1:]]
        assert sorted(cosines[others]) == pytest.approx(sorted(cosines[nearest]), abs=1e-6)
        labels = source.manifest.labels
        marks = ["same" if labels[i] == labels[query] else "other" for i in others]
        assert [mark for _, mark, _ in shown] == ["", *marks]


def test_a_page_without_its_images_says_so(tmp_path, folder, caplog):
    run = write_run(tmp_path / "rsa")
    write_untrained_run(run, tmp_path / "gone")
    caplog.set_level("INFO", "rsa_fast")
    assert "<h2>Views</h2>" not in report([run]).read_text()
    assert f"the page of {run} has no pictures: " in caplog.text and "gone" in caplog.text


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    folders = [write_run(tmp_path / place / "run") for place in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == [str(folder) for folder in folders]


def test_a_run_that_goes_on_has_a_report_of_what_is_there(tmp_path):
    folder = write_run(tmp_path / "rsa")
    for name in ("result.json", "recipe.yaml", "env.json"):
        (folder / name).unlink()
    assert Page(report([folder])).table("Scores") == {"": ["rsa"], "step": ["40"]}


def test_a_run_without_records_is_left_out_with_a_message(tmp_path, caplog):
    folder, begun = write_run(tmp_path / "rsa"), tmp_path / "begun"
    begun.mkdir()
    (begun / "metrics.jsonl").touch()
    caplog.set_level("INFO", "rsa_fast")
    page = report([begun, folder], tmp_path / "both.html")
    assert "left out: nothing is recorded yet in begun" in caplog.text
    assert page.read_text() == report([folder]).read_text()


def test_the_command_writes_the_page_and_says_where(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("rsa", "byol")]
    out = tmp_path / "both.html"
    done = invoke(main, "report", *folders, "--out", out)
    assert done.exit_code == 0 and json.loads(done.stdout) == {"out": str(out)}
    assert "<title>rsa, byol</title>" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rsa", "byol"), "2 runs on one page: give the page's name by --out"),
        (("rsa", "--out", "page.pdf"), "the name must end in .html"),
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
    done = invoke(main, "report", *arguments)
    assert done.exit_code != 0 and message in done.output and "Traceback" not in done.output
    assert not list(tmp_path.rglob("*.html")) and not list(tmp_path.rglob("*.pdf"))


def test_a_report_that_fails_takes_nothing_from_the_run(tmp_path, monkeypatch, caplog):
    folder = write_run(tmp_path / "rsa")
    try_to_report(folder)
    assert (folder / "report.html").is_file() and caplog.text == ""
    monkeypatch.setattr(module, "curves", lambda runs: 1 / 0)
    try_to_report(folder)
    message = f"no report (division by zero); when this is fixed, run: rsa-fast report {folder}"
    assert message in caplog.text


@needs_browser
def test_a_browser_shows_the_page(tmp_path):
    """The screenshot has lines in the colours of both runs, and the picture of the histogram."""
    path = report(
        [write_run(tmp_path / name, seed) for seed, name in enumerate(("rsa", "byol"))],
        tmp_path / "both.html",
    )
    light = "--blink-settings=preferredColorScheme=1"
    browse(path, light, f"--screenshot={tmp_path / 'page.png'}")
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).reshape(-1, 3).astype(int)
    assert len(pixels) == 1280 * 1600
    for colour in ((0x24, 0x63, 0xC4), (0xCF, 0x5F, 0x10)):
        assert (np.abs(pixels - colour).max(1) < 20).sum() > 500
    assert (pixels == 255).all(1).mean() > 0.5


@needs_browser
def test_the_values_below_the_pointer_are_those_of_the_records(tmp_path):
    folder = write_run(tmp_path / "rsa")
    script = """
    const plot = document.querySelectorAll(".plot")[1], box = plot.getBoundingClientRect();
    plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.x + box.width * 3 / 4 }));
    const shown = [...document.querySelectorAll(".keys b")].map(x => x.textContent);
    const widths = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    plot.dispatchEvent(new PointerEvent("pointerleave", {}));
    const after = document.querySelector(".keys b").textContent;
    document.title = [...shown, document.querySelector(".cursor b").textContent, after, widths];
    """
    *shown, x, after, too_wide = title_after(report([folder]), script).split(",")
    keys = [key for keys in PANELS.values() for key in keys]
    at_epoch_3 = [dict(points(folder, key).tolist())[3.0] for key in keys]
    assert [float(value) for value in shown] == pytest.approx(at_epoch_3, rel=1e-3)
    assert (x, too_wide) == ("3", "0")
    assert after == f"{points(folder, 'loss')[-1, 1]:.4g}"


def test_the_confused_classes_are_drawn_and_the_worst_are_listed(tmp_path):
    names = ["cats", "dogs", "<owls>", "newts"]
    counts = np.array([[8, 2, 0, 0], [3, 1, 0, 1], [0, 0, 5, 0], [0, 0, 0, 0]])
    folder = write_run(tmp_path / "rsa")
    rows = [[int(i), int(j), int(counts[i, j])] for i, j in np.argwhere(counts)]
    content = {"score": "linear", "classes": names, "counts": rows}
    (folder / "confusion.json").write_text(json.dumps(content))
    path = report([folder])
    # The section has two tables: the other one has a column for each of the four classes.
    rows = Page(path).tables["Classes by linear, rsa"]
    table = {name: cells for name, *cells in rows if len(cells) == 3}
    assert list(table) == ["class", "dogs", "cats", "<owls>"]  # newts have no test images
    assert table["dogs"] == ["20.0", "5", "cats (3)"]
    assert table["cats"] == ["80.0", "10", "dogs (2)"]
    assert table["<owls>"] == ["100.0", "5", "-"]
    (cells,) = re.findall('<table class="cells">.*?</table>', path.read_text())
    assert re.findall("<th>([^<]*)</th>", cells)[1:] == 2 * list(map(escape, names))
    numbers = [int(text or 0) for text in re.findall("<td[^>]*>(.*?)</td>", cells)]
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


def test_the_page_of_a_run_of_two_processes_has_its_pictures(folder, tmp_path):
    words = ["--dataset", "cifar10", "--data", folder, "--out", tmp_path / "run", "--nproc", 2]
    words += ["--epochs", 1, "--batch-size", 8, "--no-eval"]
    words += set_options(NETWORK | {"precision": "fp32"})
    command = [sys.executable, "-m", "rsa_fast", "train", *map(str, words)]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Nearest images" in page and page.count("<img") > 4 * 5
