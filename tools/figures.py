"""Draw the pictures of the README and of docs/ from recorded data.

    python -m tools.figures                             # all pictures, into docs/figures
    python -m tools.figures --record data/demo          # first train the runs of resume.svg again

| picture | what it shows |
|---|---|
| views.png | three photographs, their two crops and their four views |
| flow.svg | which network sees which views, and the weight of their pairs |
| throughput.svg | views per second, from experiments/views_per_second.json |
| resume.svg | the same run with 20 kills and without, from experiments/killed_runs.json |

Each picture has a white background, so that it can also be read on a dark page. The same inputs
give the same files.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rsa_fast.insight.preview import CROP_INKS, view_levels, windows
from rsa_fast.pipelines import VIEWS, Order, open_source
from rsa_fast.pipelines.draws import draw
from rsa_fast.pipelines.files import json_text, write_text
from rsa_fast.recipes import build_recipe
from rsa_fast.schedules import cosine_ramp
from rsa_fast.tools.make_demo import make_demo
from rsa_fast.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]  # the package has a link to this folder
FIGURES = ROOT / "docs" / "figures"
PHOTOGRAPHS = FIGURES / "photographs"
KILLED_RUNS = ROOT / "experiments" / "killed_runs.json"
VIEWS_PER_SECOND = ROOT / "experiments" / "views_per_second.json"

KILLS = 20
# Small images and a narrow network: a step takes milliseconds, and an epoch has 25 steps.
RUN = ["--dataset", "demo", "--method", "rsa", "--epochs", "12", "--batch-size", "8"]
for setting in (
    "width=4",
    "views.size_px=16",
    "precision=fp32",
    "log_every_steps=1",
    "knn_every_epochs=0",
):
    RUN += ["--set", setting]


# ---- The recorded runs


def record(data: Path) -> None:
    """Train a run without kills and one that is killed at random moments, and record both.

    `data` is the folder of the demo's images. They are drawn if it does not exist.
    """
    make_demo(data, per_class=25)
    moments = random.Random(0)
    kills = []
    with TemporaryDirectory() as folder:
        alone, killed = Path(folder, "alone"), Path(folder, "killed")
        subprocess.run(train_command(data, alone), check=True)
        for _ in range(KILLS):
            run = subprocess.Popen([*train_command(data, killed), "--resume"])
            more_steps = moments.randrange(24)  # an epoch has 25 steps and ends with a checkpoint
            before = last_step(killed)
            while run.poll() is None and last_step(killed) < before + more_steps:
                time.sleep(0.01)
            run.kill()
            run.wait()
            kills.append(last_step(killed))
        subprocess.run([*train_command(data, killed), "--resume"], check=True)
        recorded = {
            "command": "rsa-fast " + " ".join(train_command(Path("DATA"), Path("OUT"))[3:]),
            "killed_at_step": kills,
            "loss_alone": losses(alone),
            "loss_killed": losses(killed),
        }
    write_text(KILLED_RUNS, json_text(recorded) + "\n")


def train_command(data: Path, out: Path) -> list[str]:
    command = [sys.executable, "-m", "rsa_fast", "train", *RUN]
    return [*command, "--data", str(data), "--out", str(out)]


def last_step(out: Path) -> int:
    """The last step that a run has recorded, or 0."""
    if not (out / "metrics.jsonl").is_file():
        return 0
    return max((record["step"] for record in read_metrics(out)), default=0)


def losses(out: Path) -> list[float]:
    """The loss of each step of a run."""
    return [record["loss"] for record in read_metrics(out) if "loss" in record]


# ---- The pictures

PAPER, BORDER, INK, PALE = "#ffffff", "#d0d7de", "#24292f", "#8c959f"
RED, BLUE = CROP_INKS[:2]
ORANGE = "#bc4c00"
GAP_PX, LINE_PX = 12, 24
VIEW_PX = 144
VIEWS_EPOCH = 0  # in this epoch, jitter, grayscale and blur all occur


def draw_views(out: Path) -> None:
    """Three photographs with their crop windows, and the views that RSA's ImageNet recipe makes."""
    recipe = build_recipe("imagenet1k", "rsa", views={"size_px": VIEW_PX})
    source = open_source(PHOTOGRAPHS, "pretrain")
    order = Order(len(source.manifest), len(source.manifest), recipe.seed)
    ids = order.ids(VIEWS_EPOCH, 0)
    params = draw(recipe.seed, VIEWS_EPOCH, ids, recipe.views, source.manifest.sizes[ids])
    levels = view_levels(recipe, source, order, VIEWS_EPOCH, "native")

    first_px = VIEW_PX * 4 // 3
    lefts = [GAP_PX] + [first_px + 2 * GAP_PX + i * (VIEW_PX + GAP_PX) for i in range(len(VIEWS))]
    size = (lefts[-1] + VIEW_PX + GAP_PX, LINE_PX + len(ids) * (VIEW_PX + GAP_PX) + GAP_PX)
    page = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(16)
    pen.rectangle([0, 0, size[0] - 1, size[1] - 1], outline=BORDER)
    headings = [("photograph, two crops", INK)]
    headings += [(name.replace("_", " "), CROP_INKS[int(name[-1]) - 1]) for name in VIEWS]
    for left, (heading, ink) in zip(lefts, headings, strict=True):
        pen.text((left, GAP_PX // 2), heading, ink, font)
    for row, sample in enumerate(ids):
        top = LINE_PX + GAP_PX // 2 + row * (VIEW_PX + GAP_PX)
        page.paste(windows(source.read(sample), params[row], VIEW_PX), (lefts[0], top))
        for left, name in zip(lefts[1:], VIEWS, strict=True):
            pixels = levels[name][row].round().clip(0, 255).astype(np.uint8)
            page.paste(Image.fromarray(pixels), (left, top))
    # 256 colours take a third of the bytes.
    page.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(out, optimize=True)


class Drawing:
    """An SVG picture. Shapes are added one on top of the other. Sizes are in px."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.shapes: list[str] = []
        self.box(0.5, 0.5, width - 1, height - 1, fill=PAPER, stroke=BORDER)

    def add(self, tag: str, attributes: Mapping[str, object], text: str = "") -> None:
        words = "".join(
            f' {name.replace("_", "-")}="{value:.4g}"'
            if isinstance(value, float)
            else f' {name.replace("_", "-")}="{value}"'
            for name, value in attributes.items()
        )
        self.shapes.append(f"<{tag}{words}>{escape(text)}</{tag}>")

    def box(self, x: float, y: float, width: float, height: float, **style: object) -> None:
        self.add("rect", {"x": x, "y": y, "width": width, "height": height, "rx": 6} | style)

    def text(self, x: float, y: float, text: str, size: int = 14, anchor: str = "start") -> None:
        """Lines of text. The base line of the first one is at `y`."""
        for i, line in enumerate(text.split("\n")):
            place = {"x": x, "y": y + 1.3 * size * i, "font_size": size, "text_anchor": anchor}
            self.add("text", {"fill": INK} | place, line)

    def line(self, points: Sequence[tuple[float, float]], **style: object) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.add("polyline", {"points": path, "fill": "none", "stroke": INK} | style)

    def save(self, out: Path) -> None:
        size = f'width="{self.width}" height="{self.height}"'
        view = f'viewBox="0 0 {self.width} {self.height}"'
        tip = '<path d="M0,0 L8,4 L0,8 z"/>'
        marker = 'markerWidth="8" markerHeight="8" refX="8" refY="4" markerUnits="userSpaceOnUse"'
        write_text(
            out,
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {view} '
            'font-family="Helvetica, Arial, sans-serif">\n'
            f'<marker id="tip" {marker} orient="auto" fill="{INK}">{tip}</marker>\n'
            + "\n".join(self.shapes)
            + "\n</svg>\n",
        )


def draw_flow(out: Path) -> None:
    """Weak views to the target, aggressive views to the online network, and beta over a run."""
    drawing = Drawing(960, 350)
    drawing.text(20, 36, "RSA: one decode, two crops, four views", size=18)

    def node(x: int, y: int, width: int, text: str, ink: str) -> None:
        drawing.box(x, y, width, 100, fill=ink, fill_opacity=0.1, stroke=ink, stroke_width=1.5)
        drawing.text(x + width / 2, y + 54 - 10 * text.count("\n"), text, 16, "middle")

    def arrow(*points: tuple[float, float], **style: object) -> None:
        drawing.line(points, stroke_width=1.5, marker_end="url(#tip)", **style)

    top, bottom = 65, 225
    node(20, top, 100, "image", INK)
    node(190, top, 160, "two weak\nviews", BLUE)
    node(190, bottom, 160, "two aggressive\nviews", ORANGE)
    node(410, top, 130, "target\nnetwork", BLUE)
    node(410, bottom, 130, "online\nnetwork", ORANGE)
    node(610, top, 190, "aggressive with weak\nweight 1 \N{MINUS SIGN} \u03b2", INK)
    node(610, bottom, 190, "both aggressive\nweight \u03b2", INK)
    arrow((120, top + 50), (190, top + 50))
    arrow((270, top + 100), (270, bottom))
    for start, end in ((350, 410), (540, 610)):
        arrow((start, top + 50), (end, top + 50))
        arrow((start, bottom + 50), (end, bottom + 50))
    arrow((540, bottom + 20), (610, top + 85))
    arrow((475, bottom), (475, top + 100), stroke_dasharray="5 4")
    drawing.text(155, top + 20, "crop,\nflip", anchor="middle")
    drawing.text(280, 192, "colour,\ngray, blur")
    drawing.text(465, 192, "moving\naverage", anchor="end")
    drawing.text(705, 202, "pairs of different crops", anchor="middle")

    left, width, high, low = 840, 90, top + 30, bottom + 60
    drawing.text(left + width / 2, top + 12, "\u03b2", 18, "middle")
    curve = [(i / 50, cosine_ramp(i, 50)) for i in range(51)]
    drawing.line([(left, high - 10), (left, low), (left + width, low)])
    points = [(left + width * x, low - (low - high) * y) for x, y in curve]
    drawing.line(points, stroke=ORANGE, stroke_width=2.5)
    drawing.text(left - 6, low + 5, "0", anchor="end")
    drawing.text(left, low + 22, "start", anchor="middle")
    drawing.text(left + width, low + 22, "end", anchor="middle")
    drawing.save(out)


def draw_throughput(out: Path) -> None:
    """Bars of views per second. The bars of this project are coloured."""
    panels = json.loads(VIEWS_PER_SECOND.read_text())["panels"]
    count = sum(len(panel["images_per_s"]) for panel in panels)
    drawing = Drawing(920, 40 * count + 80 * len(panels) + 10)
    left, longest, y = 245, 540, 0
    for panel in panels:
        rates = {
            name: panel["views_per_image"] * rate for name, rate in panel["images_per_s"].items()
        }
        drawing.text(left, y + 34, f"{panel['title']}: views per second", size=17)
        y += 50
        first, most = next(iter(rates.values())), max(rates.values())
        for name, rate in rates.items():
            length, ours = longest * rate / most, name.startswith("rsa-fast")
            drawing.text(left - 10, y + 20, name, 15, "end")
            drawing.box(left, y, length, 30, fill=BLUE if ours else PALE)
            drawing.text(left + length + 8, y + 20, f"{rate:,.0f}  ({rate / first:.1f}x)", 15)
            y += 40
        drawing.text(left, y + 10, panel["machine"])
        y += 30
    drawing.save(out)


def draw_resume(out: Path) -> None:
    """The losses of both recorded runs over the steps, and the steps at which one was killed."""
    recorded = json.loads(KILLED_RUNS.read_text())
    alone, killed = recorded["loss_alone"], recorded["loss_killed"]
    kills = recorded["killed_at_step"]
    largest = max(abs(a - b) for a, b in zip(alone, killed, strict=True))
    drawing = Drawing(920, 340)
    drawing.text(
        60, 34, f"Loss of the same run. Largest difference over {len(alone)} steps: {largest:g}", 17
    )
    left, right, top, low = 60, 890, 60, 270
    ceiling = max(alone)

    def place(step: float, loss: float) -> tuple[float, float]:
        return left + (right - left) * step / len(alone), low - (low - top) * loss / ceiling

    # The names, the places of the names, and the styles of the two lines.
    lines: tuple[tuple[list[float], str, int, dict[str, object]], ...] = (
        (alone, "left alone", 60, {"stroke": BLUE, "stroke_opacity": 0.35, "stroke_width": 6}),
        (
            killed,
            f"killed {len(kills)} times and resumed",
            190,
            {"stroke": RED, "stroke_width": 1.3},
        ),
    )
    for values, name, key_x, style in lines:
        points = [place(step, loss) for step, loss in enumerate(values, 1)]
        drawing.line(points, stroke_linejoin="round", **style)
        drawing.line([(key_x, 315), (key_x + 30, 315)], **style)
        drawing.text(key_x + 38, 320, name)
    drawing.line([(left, top), (left, low), (right, low)])
    for kill in kills:
        x, _ = place(kill, 0)
        drawing.line([(x, low - 16), (x, low)], stroke_width=1.5)
    for step in range(0, len(alone) + 1, 50):
        drawing.text(place(step, 0)[0], low + 20, str(step), anchor="middle")
    for loss in range(int(ceiling) + 1):
        drawing.text(left - 8, place(0, loss)[1] + 5, str(loss), anchor="end")
    drawing.line([(440, 307), (440, 323)], stroke_width=1.5)
    drawing.text(450, 320, "kill -9")
    drawing.text(right, low + 45, "step", anchor="end")
    drawing.save(out)


DRAWERS = {
    "views.png": draw_views,
    "flow.svg": draw_flow,
    "throughput.svg": draw_throughput,
    "resume.svg": draw_resume,
}


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=FIGURES, help="Folder for the pictures."
)
@click.option(
    "--record",
    "data",
    type=click.Path(path_type=Path),
    help="First train the runs of resume.svg again, on the demo's images in this folder.",
)
def main(out: Path, data: Path | None) -> None:
    """Draw the pictures of the README and of docs/."""
    if data:
        record(data)
    out.mkdir(parents=True, exist_ok=True)
    for name, drawer in DRAWERS.items():
        drawer(out / name)
        click.echo(f"{out / name}: {(out / name).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
