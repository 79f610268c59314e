"""The common parts of all web pages of rsa-fast: style, charts, bars, tables and pictures.

    loss = Line("loss", x=[0, 100, 200], y=[1.5, 0.7, 0.6])
    text = html_page("One run", chart("loss", [loss], Axis(200, "epoch")))

A page is one HTML file that contains everything, so it loads nothing. It follows the reader's
choice of light or dark colours, and fits a phone. Charts are complete without the script, which
only shows the values below the pointer. All charts of a page have the same x axis, so the pointer
is shown in all of them at the same time.
"""

from __future__ import annotations

import base64
import io
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = 8  # the colours of the style, --c0 to --c7
UNITS = 10_000  # the width and the height of a plot in SVG units
DOTTED_POINTS = 15  # lines with at most this number of points have a dot at each point

STYLE = """
:root { color-scheme: light dark; --page: #fff; --box: #f5f6f8; --line: #dfe2e7; --ink: #1b2027;
  --pale: #626b78; --good: #1a7f37; --fair: #9a6700; --bad: #c62828; --c0: #2463c4; --c1: #cf5f10;
  --c2: #1d8a48; --c3: #8048c0; --c4: #0b7f92; --c5: #bf3a78; --c6: #80652e; --c7: #5d6675 }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --box: #1e232a; --line: #343b45;
  --ink: #e4e8ed; --pale: #9aa4b2; --good: #4cc26b; --fair: #dfa93a; --bad: #ff7b72; --c0: #74a9ff;
  --c1: #ff9d54; --c2: #5dcb80; --c3: #c09aff; --c4: #4fc6d8; --c5: #ff8abb; --c6: #d1b070;
  --c7: #a8b1be } }
* { box-sizing: border-box }
body { font: 14px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1160px; margin: 0 auto; padding: 24px 16px 48px }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere }
h2 { font-size: 17px; margin: 32px 0 8px } h3 { font-size: 13px; margin: 0; font-weight: 600 }
p { margin: 4px 0 10px; max-width: 80ch } .pale, figcaption, summary { color: var(--pale) }
code { display: block; font: 12px/1.5 ui-monospace, monospace; background: var(--box);
  padding: 8px 12px; border-radius: 6px; overflow-wrap: anywhere; user-select: all }
.grid { display: grid; gap: 20px 24px; align-items: end; margin: 16px 0 }
.grid { grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)) }
.wide { grid-template-columns: 1fr } .box { background: var(--box); border-radius: 8px }
.box { padding: 12px 16px; align-self: stretch } .long { max-width: none }
.big { font-size: 30px; line-height: 1.2; font-weight: 650 }
.beside { display: grid; gap: 8px 40px; align-items: start }
.beside { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)) }
.good { color: var(--good) } .fair { color: var(--fair) } .bad { color: var(--bad) }
.gauge { position: relative; height: 8px; margin: 8px 0; background: var(--line) }
.gauge i { position: absolute; top: -3px; height: 14px; width: 2px; background: var(--ink) }
.gauge i:first-child { top: 0; left: 0; height: 8px }
.chart { min-width: 0 } .keys { font-size: 12px; min-height: 18px; color: var(--pale) }
.keys span { margin-right: 14px; white-space: nowrap } .keys b { color: var(--ink) }
.keys b, table { font-variant-numeric: tabular-nums }
.keys svg { width: 20px; height: 8px; margin-right: 5px }
.plot { position: relative; height: 130px; margin: 8px 8px 22px 44px; touch-action: pan-y }
.wide .plot { height: 210px } .plot > svg { width: 100%; height: 100%; overflow: hidden }
.plot > svg, .keys svg { display: inline-block; vertical-align: middle }
.plot path, .keys path { fill: none; stroke-width: 1.8; vector-effect: non-scaling-stroke }
.plot path { stroke-linejoin: round; stroke-linecap: round }
.plot .rule { stroke: var(--line); stroke-width: 1 }
.plot .level { stroke: var(--pale); stroke-width: 1; stroke-dasharray: 2 4 }
.plot .dots { stroke-width: 5 } .plot .best { stroke-width: 11; opacity: .45 }
.plot span { position: absolute; font-size: 11px; line-height: 14px; color: var(--pale) }
.plot .y { right: 100%; margin: -7px 6px 0; white-space: nowrap }
.plot .x { top: 100%; margin-top: 4px; transform: translateX(-50%); white-space: nowrap }
.plot .level-name { right: 0; margin: -15px 4px 0 } .plot .below { margin-top: 1px }
.plot .cursor { top: 0; bottom: 0; width: 1px; background: var(--pale); display: none }
.cursor b { position: absolute; top: 100%; left: 0; margin-top: 3px; padding: 1px 5px }
.cursor b { transform: translateX(-50%); background: var(--ink); color: var(--page) }
.cursor b { border-radius: 4px; font-weight: 400; white-space: nowrap }
.bar { display: flex; height: 22px; margin: 2px 0 10px } .bar i { overflow: hidden; padding: 0 4px }
.bar i { font: 11px/22px system-ui, sans-serif; color: var(--page); min-width: 0; padding: 0 }
.bar i { text-align: center }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 9px; margin-right: 5px }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: 13px }
th, td { text-align: left; vertical-align: top; padding: 3px 18px 3px 0; min-width: 5em }
th, td { border-bottom: 1px solid var(--line); overflow-wrap: break-word; max-width: 60ch }
tbody th { font-weight: 400; color: var(--pale) } .differs td { color: var(--fair) }
summary { cursor: pointer; font-size: 17px; font-weight: 650; margin: 14px 0 }
.row { display: flex; flex-wrap: wrap; gap: 6px; margin: 0 0 14px }
figure { margin: 0; width: 98px } figure:first-child { margin-right: 14px }
figure img { width: 100%; display: block; border: 3px solid transparent; border-radius: 5px }
img.same { border-color: var(--good) } img.other { border-color: var(--line) }
img.small { image-rendering: pixelated }
figcaption { font-size: 11px; white-space: nowrap; overflow: hidden; text-overflow: ellipsis }
.cells td { min-width: 0; max-width: none; padding: 2px 4px; border: 1px solid var(--page) }
.cells { font-size: 11px } .cells td { text-align: center; height: 2.2em; min-width: 2.2em }
.cells th { min-width: 0; padding: 0 6px; border: 0; vertical-align: middle; text-align: right }
.cells thead th { writing-mode: vertical-rl; padding: 6px 0; transform: rotate(180deg) }
.cells thead th { text-align: left; max-height: 12em }
@media (max-width: 560px) { figure { width: calc(20% - 6px) }
  figure:first-child { margin-right: 0 }
  .grid:not(.wide) { grid-template-columns: 1fr 1fr; gap: 16px 12px } .box { padding: 8px 10px }
  .plot { margin-left: 36px; margin-right: 4px } body { padding: 16px 12px } }
"""
# The legend of each chart shows its last values, or those below the pointer.
SCRIPT = """
const plots = [...document.querySelectorAll(".plot")].map(plot => ({
  plot, cursor: plot.querySelector(".cursor"), end: +plot.dataset.end,
  low: +plot.dataset.low, high: +plot.dataset.high,
  lines: [...plot.querySelectorAll("path.line")].map((path, i) => ({
    points: path.getAttribute("d").match(/[-\\d.]+/g).map(Number),
    value: plot.parentNode.querySelectorAll(".keys b")[i] })) }));
for (const { lines } of plots) for (const line of lines) line.last = line.value.textContent;
function show(share) {
  for (const { cursor, end, low, high, lines } of plots) {
    cursor.style.display = share === null ? "none" : "block";
    if (share === null) { for (const line of lines) line.value.textContent = line.last; continue; }
    cursor.style.left = 100 * share + "%";
    cursor.firstChild.textContent = +(share * end).toPrecision(3);
    for (const { points, value } of lines) {
      let best = 0;
      for (let i = 2; i < points.length; i += 2)
        if (Math.abs(points[i] - UNITS * share) < Math.abs(points[best] - UNITS * share)) best = i;
      const beyond = UNITS * share > points[points.length - 2] + UNITS / 50;
      const number = high - points[best + 1] / UNITS * (high - low);
      value.textContent = beyond ? "-" : +number.toPrecision(4);
    }
  }
}
for (const { plot } of plots) {
  const move = event => {
    const box = plot.getBoundingClientRect();
    show(Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)));
  };
  plot.addEventListener("pointermove", move);
  plot.addEventListener("pointerdown", move);
  plot.addEventListener("pointerleave", () => show(null));
}
""".replace("UNITS", str(UNITS))


def html_page(title: str, body: str, script: str = "", head: str = "") -> str:
    """A complete page. `title` is text, `body` is HTML, and `script` is an additional script.

    `head` is HTML for the page's head.
    """
    scripts = (SCRIPT if 'class="plot"' in body else "") + script
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{head}<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n{body}\n"
        f"{f'<script>{scripts}</script>' if scripts else ''}</body></html>\n"
    )


def command_line(command: list[str]) -> str:
    """The command as a user would type it, without the path of the program."""
    program = Path(command[0])
    if program.name == "__main__.py":
        return shlex.join(["python", "-m", program.parent.name, *command[1:]])
    first = ["python", command[0]] if program.suffix == ".py" else [program.name]
    return shlex.join([*first, *command[1:]])


@dataclass(frozen=True)
class Line:
    """A line of a chart: points in the order of x. The style is 0 solid, 1 dashed or 2 dotted."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    style: int = 0


@dataclass(frozen=True)
class Axis:
    """The x axis of a page's charts, from 0 to `end`."""

    end: float
    name: str


def chart(
    title: str,
    lines: Sequence[Line],
    axis: Axis,
    *,
    from_zero: bool = False,
    levels: Mapping[str, float] | None = None,
    best: tuple[float, float] | None = None,
    heat: tuple[np.ndarray, tuple[float, float, float, float]] | None = None,
) -> str:
    """A chart as HTML. Its plot is SVG, and all text is outside of it, so it is never scaled.

    `levels` are named values to compare with, and `best` is a point to mark. `heat` contains shares
    from 0 to 1 `(rows, columns)` and the range `(left, right, low, high)` of x and y. The shares
    are shown as darkness in this range.
    """
    levels = levels or {}
    values = [y for line in lines for y in line.y] + list(levels.values())
    low, high = (0.0 if from_zero else min(values)), max(values)
    if heat:
        low, high = min(low, heat[1][2]), max(high, heat[1][3])
    rules = ticks(low, high)
    low, high = rules[0], rules[-1]

    def place(x: float, y: float) -> str:
        return f"{UNITS * x / axis.end:.1f} {UNITS * (high - y) / (high - low):.1f}"

    shapes, labels = [], []
    if heat:
        shares, (left, right, bottom, top) = heat
        (x, y), (x_end, y_end) = (
            map(float, place(*corner).split()) for corner in ((left, top), (right, bottom))
        )
        shapes.append(
            f'<image x="{x}" y="{y}" width="{x_end - x:.1f}" height="{y_end - y:.1f}" '
            'preserveAspectRatio="none" style="image-rendering: pixelated" '
            f'href="{darkness(shares)}"/>'
        )
    for value in rules:
        height = 100 * (high - value) / (high - low)
        shapes.append(f'<path class="rule" d="M0 {100 * height:.1f}H{UNITS}"/>')
        labels.append(f'<span class="y" style="top:{height:.2f}%">{value:.6g}</span>')
    for value in ticks(0, axis.end, integers=True):
        if value <= axis.end:
            share = 100 * value / axis.end
            name = f"{axis.name} {value:g}" if value == 0 else f"{value:g}"
            labels.append(f'<span class="x" style="left:{share:.2f}%">{name}</span>')
    for name, value in levels.items():
        shapes.append(f'<path class="level" d="M{place(0, value)}H{UNITS}"/>')
        height = 100 * (high - value) / (high - low)
        # If two levels are close, one name is above and the other below.
        side = " below" if value < max(levels.values()) else ""
        labels.append(
            f'<span class="level-name{side}" style="top:{height:.2f}%">'
            f"{escape(name)} {value:.4g}</span>"
        )
    keys = []
    for line in lines:
        stroke = f"stroke: var(--c{line.colour % COLOURS})"
        dashes = (
            f"{stroke}",
            f"{stroke}; stroke-dasharray: 7 5",
            f"{stroke}; stroke-dasharray: 2 4",
        )
        points = [place(x, y) for x, y in zip(line.x, line.y, strict=True)]
        style = dashes[line.style]
        shapes.append(f'<path class="line" style="{style}" d="M{"L".join(points)}"/>')
        if len(points) <= DOTTED_POINTS:
            dots = "".join(f"M{point}h0" for point in points)
            shapes.append(f'<path class="dots" style="{stroke}" d="{dots}"/>')
        keys.append(
            f'<span><svg viewBox="0 0 20 8"><path style="{style}" d="M0 4H20"/></svg>'
            f"{escape(line.name)} <b>{line.y[-1]:.4g}</b></span>"
        )
    if best:
        shapes.append(f'<path class="best" style="stroke: var(--c0)" d="M{place(*best)}h0"/>')
        keys.append(f"<span>best {best[1]:.4g} at {axis.name} {best[0]:.4g}</span>")
    return (
        f'<div class="chart"><h3>{escape(title)}</h3><div class="keys">{"".join(keys)}</div>'
        f'<div class="plot" data-end="{axis.end:g}" data-low="{low:.9g}" data-high="{high:.9g}">'
        f'<svg viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio="none">{"".join(shapes)}</svg>'
        f'{"".join(labels)}<span class="cursor"><b></b></span></div></div>\n'
    )


def ticks(low: float, high: float, count: int = 5, integers: bool = False) -> list[float]:
    """About `count` round numbers, which cover the range from `low` to `high`."""
    if low == high:
        low, high = low - abs(low or 1) / 10, high + abs(low or 1) / 10
    least = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(least))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= least * (1 - 1e-9))
    step = max(1.0, step) if integers else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * k, 12) for k in range(first, last + 1)]


def darkness(shares: np.ndarray) -> str:
    """A picture of shares from 0 to 1 `(H, W)`, in one colour with their square root as opacity.

    The root also makes small shares visible. The picture is a PNG as a data URL.
    """
    pixels = np.empty((*shares.shape, 4), np.uint8)
    pixels[..., :3] = (0x50, 0x88, 0xE0)  # visible on white and on black
    pixels[..., 3] = np.rint(255 * np.sqrt(shares))
    return data_url(Image.fromarray(pixels), "PNG")


def data_url(image: Image.Image, kind: str) -> str:
    """An image as a URL, such as `data:image/png;base64,...`. `kind` is PNG or JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 80} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def bars(title: str, rows: Mapping[str, Mapping[str, float]], unit: str) -> str:
    """Stacked bars as HTML, one for each row. Each has the same parts, followed by their sum."""
    parts = list(next(iter(rows.values())))
    names = [escape(part.replace("_", " ")) for part in parts]
    longest = max(sum(row.values()) for row in rows.values())
    keys = "".join(
        f'<span><i class="dot" style="background: var(--c{i % COLOURS})"></i>{name}</span>'
        for i, name in enumerate(names)
    )
    html = [f'<div><h3>{escape(title)}, {escape(unit)}</h3><div class="keys">{keys}</div>']
    for name, row in rows.items():
        pieces = []
        for i, part in enumerate(parts):
            share = 100 * row[part] / longest
            pieces.append(
                f'<i style="width:{share:.3f}%; background: var(--c{i % COLOURS})" '
                f'title="{names[i]}: {row[part]:.2f} {escape(unit)}">'
                f"{f'{row[part]:.3g}' if share > 5 else ''}</i>"
            )
        total = sum(row.values())
        html.append(
            f'<div>{escape(name)} <span class="pale">{total:.4g}</span></div>'
            f'<div class="bar">{"".join(pieces)}</div>'
        )
    return "".join(html) + "</div>\n"


def table(head: Iterable[str], rows: Iterable[Sequence[str]], marked: Sequence[int] = ()) -> str:
    """A table of text as HTML. Rows whose indices are in `marked` have the class `differs`."""
    lines = []
    for i, (name, *cells) in enumerate(rows):
        texts = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        mark = ' class="differs"' if i in marked else ""
        lines.append(f"\n<tr{mark}><th>{escape(name)}</th>{texts}</tr>")
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return (
        f'<div class="scroll"><table><thead><tr>{names}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>\n"
    )


@dataclass(frozen=True)
class Picture:
    """An image in a row, with a caption and a text on hover. `mark` is its frame's CSS class."""

    url: str
    caption: str
    title: str
    mark: str = ""


def picture_row(pictures: Iterable[Picture]) -> str:
    """Pictures side by side as HTML. There is a gap after the first one."""
    return (
        '<div class="row">'
        + "".join(
            f'<figure title="{escape(picture.title)}">'
            f'<img class="{picture.mark}" alt="{escape(picture.caption)}" src="{picture.url}">'
            f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
            for picture in pictures
        )
        + "</div>\n"
    )
