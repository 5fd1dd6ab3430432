"""Figures of a report as inline SVG, in the colours of the surrounding page."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import (
  FuncFormatter,
  LogLocator,
  MaxNLocator,
  NullFormatter,
  PercentFormatter,
)
from PIL import Image

Series = tuple[Sequence[float], Sequence[float]]  # steps, values

# Placeholders that become CSS variables, so that one figure suits light and dark pages.
_COLOURS = {
  "#010101": "ink",
  "#020202": "faint",
  "#030303": "image",
  "#040404": "text",
  "#050505": "c",
  "#060606": "d",
  "#070707": "e",
  "#080808": "f",
}
INK, FAINT, IMAGE, TEXT = list(_COLOURS)[:4]
_LINES = list(_COLOURS)[2:]
_STYLE: Any = {
  "svg.fonttype": "none",  # text stays text, in the fonts of the page
  "svg.hashsalt": "bigalign",  # equal runs give equal pages
  "text.parse_math": False,  # a $ in a name is a $
  "font.size": 9,
  "axes.titlesize": 10,
  "axes.titleweight": "bold",
  "axes.titlelocation": "left",
  "text.color": INK,
  "axes.labelcolor": FAINT,
  "axes.edgecolor": FAINT,
  "axes.titlecolor": INK,
  "xtick.color": FAINT,
  "ytick.color": FAINT,
  "grid.color": FAINT,
  "grid.alpha": 0.25,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "legend.frameon": False,
  "axes.linewidth": 0.6,
  "xtick.major.width": 0.6,
  "ytick.major.width": 0.6,
}
_HEAT = LinearSegmentedColormap.from_list(
  "heat", ["#14162b", "#28346b", "#2f6f9f", "#46b39d", "#f1e5a0", "#fdf8e4"]
)


def _svg(figure: Figure) -> str:
  """A figure as one <svg> element without size, metadata or URLs."""
  file = io.StringIO()
  no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
  figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
  text = file.getvalue()
  text = text[text.index("<svg") :]
  text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
  text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)  # not needed inside HTML
  text = re.sub(
    r'(<svg[^>]*?) width="[^"]*"',
    r"\1",
    re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1),
    count=1,
  )
  for placeholder, name in _COLOURS.items():
    text = text.replace(placeholder, f"var(--{name})")
  return text.strip()


def curves(
  series: Mapping[str, Series],
  *,
  title: str,
  log: bool = False,
  levels: Mapping[str, float] | None = None,
  percent: bool = False,
  along: str = "step",
) -> str:
  """Returns lines over steps, with a legend if there are several.

  Args:
    series: {name of a line: (steps, values)}.
    title: of the figure.
    log: use a logarithmic scale if the values span more than a decade, and none is negative.
    levels: {name of a line: chance level}, drawn dotted in the colour of the line.
    percent: whether the values are fractions to show in percent.
    along: what the horizontal axis shows, if not steps.
  """
  with matplotlib.rc_context(_STYLE):
    legend = len(series) if len(series) > 1 else 0
    figure = Figure(figsize=(5.0, 2.7 + 0.16 * legend), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, (steps, values)) in enumerate(series.items()):
      colour = _LINES[i % len(_LINES)]
      marker = "o" if len(steps) < 12 else ""
      style = "-" if i < len(_LINES) else "--"
      axes.plot(steps, values, style, color=colour, lw=1.6, label=name, marker=marker, ms=3.5)
      if levels and name in levels:
        axes.axhline(levels[name], color=colour, lw=1, ls=(0, (1, 2)))
    every = [v for _, values in series.values() for v in values]
    positive = [v for v in every if v > 0]
    if log and positive and max(positive) > 10 * min(positive) and not any(v < 0 for v in every):
      axes.set_yscale("log")
      axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
      axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
      axes.yaxis.set_minor_formatter(NullFormatter())
    if percent:
      axes.set_ylim(bottom=0)
      axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(title)
    axes.set_xlabel(along)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", lw=0.5)
    axes.margins(x=0.02)
    if legend:
      figure.legend(fontsize=7.5, loc="outside lower left", labelcolor=INK, handlelength=1.2)
    return _svg(figure)


def histogram(values: Sequence[float], *, title: str) -> str:
  """Returns a histogram of values above 0, on a logarithmic scale if they span a factor over 20."""
  least, most = min(values), max(values)
  log = most > 20 * least
  end = most if most > least else least + 1  # equal values fill the first bin
  edges = np.geomspace(least, most, 41) if log else np.linspace(least, end, 41)
  counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(4.0, 2.3), layout="constrained")
    axes = figure.add_subplot()
    axes.stairs(counts, edges, fill=True, color=IMAGE)
    if log:
      axes.set_xscale("log")
      axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.9g}"))
      axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title)
    axes.grid(axis="y", lw=0.5)
    axes.margins(x=0.02)
    return _svg(figure)


def heatmap(sims: np.ndarray) -> str:
  """Returns an image of similarities.

  Args:
    sims: [N, N], rows are images, columns captions.
  """
  with matplotlib.rc_context({**_STYLE, "axes.spines.left": False, "axes.spines.bottom": False}):
    figure = Figure(figsize=(4.6, 4.0), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(sims, cmap=_HEAT, interpolation="nearest")
    axes.set_xlabel("caption")
    axes.set_ylabel("image")
    axes.set_xticks([])
    axes.set_yticks([])
    bar = figure.colorbar(shown, ax=axes, shrink=0.85, pad=0.02)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_label("cosine similarity")
    return _svg(figure)


def grid(values: np.ndarray, *, rows: Sequence[str], columns: Sequence[str], title: str) -> bytes:
  """Returns a table of coloured cells with their numbers as a PNG on white.

  Args:
    values: [R, C].
    rows: R names.
    columns: C names.
    title: of the figure.
  """
  size = (
    1.5 + 0.06 * max(map(len, rows)) + 1.1 * len(columns),
    1.3 + 0.04 * max(map(len, columns)) + 0.6 * len(rows),
  )  # inches
  figure = Figure(figsize=size, layout="constrained", dpi=150)
  axes = figure.add_subplot()
  axes.imshow(values, cmap=_HEAT, interpolation="nearest", aspect="auto")
  axes.set_xticks(range(len(columns)), columns, rotation=20, ha="right", fontsize=8)
  axes.set_yticks(range(len(rows)), rows, fontsize=8)
  middle = (values.min() + values.max()) / 2
  for (i, j), value in np.ndenumerate(values):
    colour = "black" if value > middle else "white"
    axes.text(j, i, f"{value:.3f}", ha="center", va="center", color=colour, fontsize=8)
  axes.set_title(title, fontsize=9)
  file = io.BytesIO()
  figure.savefig(file, format="png", metadata={"Software": None})
  return file.getvalue()


def principal(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Projects vectors on their two principal axes.

  Args:
    z: [N, E].

  Returns:
    Coordinates [N, 2] and the shares of the variance [2].
  """
  centred = z - z.mean(0)
  left, scale, _ = np.linalg.svd(centred, full_matrices=False)
  shares = scale**2 / max(float((scale**2).sum()), 1e-30)
  # The sign of an axis is arbitrary; fixing it makes equal runs give equal figures.
  sign = np.sign(left[np.abs(left).argmax(0), np.arange(left.shape[1])])
  return (left * scale * sign)[:, :2], shares[:2]


def sphere(zimg: np.ndarray, ztxt: np.ndarray) -> str:
  """Returns both modalities in the plane of their joint PCA; lines join pairs, an arrow the means.

  Args:
    zimg: [N, E], embeddings of the images.
    ztxt: [N, E], embeddings of their captions.
  """
  xy, shares = principal(np.concatenate([zimg, ztxt]))
  n = len(zimg)
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(4.9, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for a, b in zip(xy[:n], xy[n:]):
      axes.plot(*zip(a, b), color=FAINT, lw=0.4, alpha=0.35, zorder=1)
    means = []
    for part, colour, label in ((xy[:n], IMAGE, "images"), (xy[n:], TEXT, "captions")):
      x, y = part.T
      axes.scatter(x, y, s=9, color=colour, alpha=0.75, lw=0, label=label, zorder=2)
      axes.scatter(x.mean(), y.mean(), s=70, color=colour, edgecolor=INK, lw=1.4, zorder=5)
      means.append((x.mean(), y.mean()))
    axes.annotate(
      "",
      xy=means[1],
      xytext=means[0],
      zorder=4,
      arrowprops=dict(arrowstyle="<->", color=INK, lw=1.8, shrinkA=0, shrinkB=0),
    )
    axes.annotate(
      f"gap {np.linalg.norm(zimg.mean(0) - ztxt.mean(0)):.2f}",
      np.mean(means, 0),
      zorder=6,
      xytext=(0, 9),
      textcoords="offset points",
      ha="center",
      weight="bold",
    )
    axes.set_xlabel(f"first axis, {shares[0]:.0%} of the variance")
    axes.set_ylabel(f"second axis, {shares[1]:.0%}")
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(fontsize=8, loc="best", labelcolor=INK, handletextpad=0.2)
    return _svg(figure)


def class_colours(count: int) -> np.ndarray:
  """[K, 3] uint8: a colour for each class; hues of neighbours are far apart."""
  hues = np.arange(count) * 0.618034 % 1  # the golden ratio: any first K are spread evenly
  values = np.where(np.arange(count) // 8 % 2, 0.6, 0.9)
  rgb = hsv_to_rgb(np.stack([hues, np.full(count, 0.65), values], -1).reshape(-1, 3))
  return np.round(255 * rgb).astype(np.uint8)


def class_map(classes: np.ndarray, colours: np.ndarray, size: int = 112) -> str:
  """Returns a data: URL of an image of classes, grey where there is none.

  Args:
    classes: [S, S] int32; -1: none.
    colours: [K, 3] uint8.
    size: largest width and height, pixels.
  """
  image = np.concatenate([colours, np.full((1, 3), 128, np.uint8)])[classes]
  small = Image.fromarray(image)
  small.thumbnail((size, size), Image.Resampling.NEAREST)
  return _url(small, "png")


def thumbnail(image: np.ndarray, size: int = 112) -> str:
  """Returns a data: URL of an image.

  Args:
    image: [H, W, 3] uint8.
    size: largest width and height, pixels.
  """
  small = Image.fromarray(image)
  small.thumbnail((size, size))
  return _url(small, "png" if max(small.size) <= 64 else "jpeg")


def _url(image: Image.Image, kind: str) -> str:
  file = io.BytesIO()
  image.save(file, kind, **({"quality": 85} if kind == "jpeg" else {}))
  return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
