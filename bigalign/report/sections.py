"""The sections of a report as HTML; all text from data or a config is escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from bigalign import tree
from bigalign.captions import BEAMS, Written
from bigalign.evals.confusion import Confusion
from bigalign.evals.segmentation import Segmented
from bigalign.evaluate import Run
from bigalign.report import figures
from bigalign.run.metrics import is_wall_clock

MATRIX = 48  # pairs in the similarity matrix
SHOWN = 6  # best and worst retrievals, in each direction
LANGUAGES = 10  # with the lowest scores
CONFUSED = 10  # pairs of classes that are confused most often, and classes that are found least

Rows = list[dict[str, int | float]]  # of metrics.jsonl: {name: number}, "step" among the names


class Pairs(NamedTuple):
  """Held-out pairs.

  Attributes:
    where: how many they are and what they are, for the page.
    images: N of [H, W, 3] uint8, as the model sees them.
    captions: N texts.
    zimg: [N, E], embeddings of the images, unit norm.
    ztxt: [N, E], embeddings of the captions, unit norm.
    written: the captions that the model writes for the first images; none without a decoder.
  """

  where: str
  images: Sequence[np.ndarray]
  captions: list[str]
  zimg: np.ndarray
  ztxt: np.ndarray
  written: Sequence[Written] = ()


def series(rows: Rows, name: str) -> figures.Series:
  """Returns the steps and the values of one metric."""
  points = [(row["step"], row[name]) for row in rows if name in row]
  return [step for step, _ in points], [value for _, value in points]


def final(rows: Rows) -> dict[str, float]:
  """Returns the last value of each evaluation metric."""
  last: dict[str, float] = {}
  for row in rows:
    last |= {k: v for k, v in row.items() if not re.match(r"(train|perf)/|step$", k)}
  return last


# Readable forms of the parts of a metric's name.
_WORDS = (
  ("-zeroshot-val", " zero-shot"),
  ("-unseen-", ": unseen characters-"),
  ("-seen-", ": seen characters-"),
  ("-all", " among all names"),
  ("-heldout", " among held-out names"),
  ("-letter", " among names of the same letter"),
  ("image_to_text", "image to text"),
  ("text_to_image", "text to image"),
)


def readable(name: str) -> str:
  """Returns a readable name: "val/coco/image_to_text_R@1" -> "coco · image to text R@1"."""
  name = name.removeprefix("val/")
  for part, words in _WORDS:
    name = name.replace(part, words)
  return re.sub("[-_](?=(top|R@)[0-9])", " ", name).replace("/", " · ")


def groups(
  values: Mapping[str, float], by_chance: Mapping[str, float]
) -> dict[str, dict[int, str]]:
  """Groups the top-k and R@k metrics whose chance level is known for the smallest k.

  Metrics of averaged parameters are left out, because they repeat the others, and those of single
  languages, which `languages` shows.

  Args:
    values: {metric: value}.
    by_chance: {metric: value by chance}.

  Returns:
    {what is measured: {k: metric}}.
  """
  by_k: dict[str, dict[int, str]] = {}
  single = {name for names in _languages(values).values() for own in names.values() for name in own}
  for name in values:
    match = re.fullmatch(r"(.*?)[-_](?:top|R@)(\d+)", name)
    if match and not name.startswith("ema/") and name not in single:
      by_k.setdefault(match[1], {})[int(match[2])] = name
  return {what: names for what, names in by_k.items() if names[min(names)] in by_chance}


def _languages(values: Mapping[str, float]) -> dict[str, dict[str, list[str]]]:
  """{beginning of the names of an evaluator's metrics: {language: its metrics}}."""
  found: dict[str, dict[str, list[str]]] = {}
  for name in values:
    start, is_count, _ = name.partition("num_languages")
    if not is_count:
      continue
    size = re.compile(rf"{re.escape(start)}(.+)-num_samples")
    own = [match[1] for match in map(size.fullmatch, values) if match]
    found[start] = {
      language: [x for x in values if x.startswith(f"{start}{language}-")] for language in own
    }
  return found


def languages(values: Mapping[str, float]) -> str:
  """Returns the languages with the lowest scores of each evaluator of several languages."""
  parts = []
  for start, names in _languages(values).items():
    if start.startswith("ema/"):
      continue
    shown = [
      metric
      for metric in ("top1", "text_to_image_R@1", "image_to_text_R@1")
      if f"{start}mean_{metric}" in values
    ]
    order = sorted(names, key=lambda own: sum(values[f"{start}{own}-{x}"] for x in shown))
    rows = [
      (own, *(f"{percent(values[f'{start}{own}-{metric}'])} %" for metric in shown))
      for own in order[:LANGUAGES]
    ]
    mean = ("mean of all", *(f"{percent(values[f'{start}mean_{metric}'])} %" for metric in shown))
    head = ("language", *(readable(metric) for metric in shown))
    what = readable(start.rstrip("-/"))
    parts.append(
      f"<h2>Languages: {escape(what)}</h2><p>The {min(len(order), LANGUAGES)} of {len(order)}"
      " languages with the lowest scores, and the mean over all languages.</p>"
      f'<div class="card">{table(head, [*rows, mean], True)}</div>'
    )
  return "".join(parts)


def percent(x: float) -> str:
  """Returns a fraction in percent with two or three significant digits: 0.00014 -> "0.014"."""
  x *= 100
  return f"{x:.1f}" if x >= 1 or x == 0 else f"{x:.2g}"


def header(run: Run, rows: Rows) -> str:
  """Returns the name of the run and the facts that identify it."""
  speed = series(rows, "train/samples_per_second")[1]
  facts = {
    "step": f"{run.step:,}",
    "samples seen": f"{run.meta['samples_seen']:,}",
    "parameters": f"{sum(x.size for x in run.params.values()):,}",
    "loss": " + ".join(run.config.loss),
    "data": "::".join(run.config.data.sources),
    "revision": run.meta["revision"],
  }
  if speed:
    facts["images/s"] = f"{np.median(speed):,.0f}"
  spans = "".join(f"<span>{escape(k)} <b>{escape(str(v))}</b></span>" for k, v in facts.items())
  return f'<h1>{escape(run.name)}</h1><div class="facts">{spans}</div>'


def headline(values: Mapping[str, float], by_chance: Mapping[str, float]) -> str:
  """Returns a card per group of metrics: value and chance level at the smallest k, larger k."""
  cards = []
  for what, names in groups(values, by_chance).items():
    first, *others = [names[k] for k in sorted(names)]
    value, level = values[first], by_chance[first]
    ratio = value / level
    times = f" · <b>{ratio:,.{0 if ratio > 10 else 1}f}× chance</b>" if ratio > 1.5 else ""
    kind = re.search(r"(top|R@)\d+$", first)
    rest = " · ".join(
      f"{escape(re.sub(r'^.*[-_]', '', name))} {percent(values[name])} %" for name in others
    )
    cards.append(
      f'<div class="card figure"><div class="label">{escape(readable(what))}</div>'
      f'<div class="value">{percent(value)}<small>% {kind[0] if kind else ""}</small></div>'
      f'<div class="track"><i style="width:{100 * value:.2f}%"></i>'
      f'<u style="left:{min(100 * level, 99.5):.2f}%"></u></div>'
      f'<div class="note">chance {percent(level)} %{times}</div>'
      f'<div class="note">{rest}</div></div>'
    )
  if not cards:
    return ""
  return (
    "<h2>Result</h2><p>Final results. Bar: score; orange mark: chance level."
    f'</p><div class="grid">{"".join(cards)}</div>'
  )


_MEDIAN = re.compile(r"train/temperature/(.+)/p50")  # of the temperatures of samples


def learning(rows: Rows, by_chance: Mapping[str, float]) -> str:
  """Returns the curves: loss, evaluation, temperature, learning rate, gradient norm, speed."""
  named = groups(final(rows), by_chance)
  evaluated = {readable(names[min(names)]): names[min(names)] for names in [*named.values()][:6]}
  present = sorted({name for row in rows for name in row})
  temperature = [name for name in present if name.endswith(("logit_scale", "/t"))]
  cards = []

  def draw(title: str, names: Mapping[str, str], **options: Any) -> None:
    lines = {label: series(rows, name) for label, name in names.items() if name in present}
    if lines:
      cards.append(f'<div class="card">{figures.curves(lines, title=title, **options)}</div>')

  draw("loss", {"loss": "train/loss"}, log=True)
  draw(
    "evaluation, dotted: chance",
    evaluated,
    percent=True,
    levels={label: by_chance[name] for label, name in evaluated.items()},
  )
  draw("temperature (factor of the cosine similarity)", {name: name for name in temperature})
  # "image" and "text", or, of several terms or widths, "<term>/image".
  of_samples = [match[1] for match in map(_MEDIAN.fullmatch, present) if match]
  for what in of_samples:
    quantiles = {name: f"train/temperature/{what}/{name}" for name in ("p95", "p50", "p5")}
    draw(f"temperatures of the samples, {what}", quantiles)
  fitted = {what: f"train/temperature/{what}/caption_frequency_slope" for what in of_samples}
  draw("temperature per tenfold caption frequency", fitted)
  draw("learning rate", {"rate": "train/lr"})
  draw("gradient norm", {"gradient": "train/grad_norm"}, log=True)
  draw("images per second", {"images/s": "train/samples_per_second"})
  return f'<h2>Learning</h2><div class="grid two">{"".join(cards)}</div>' if cards else ""


def corruptions(values: Mapping[str, float]) -> str:
  """Returns the accuracy over the severity of each kind, of each evaluator `corruptions`."""
  every: dict[str, dict[str, list[tuple[int, float]]]] = {}
  for name, value in values.items():
    match = re.fullmatch(r"(val/.*-corruptions-)(\w+)-(\d)-top1", name)
    if match:
      lines = every.setdefault(match[1], {})
      lines.setdefault(match[2], [(0, values[f"{match[1]}top1"])]).append((int(match[3]), value))
  parts = []
  for start, lines in every.items():
    drawn = figures.curves(
      {kind: ([x for x, _ in line], [y for _, y in line]) for kind, line in lines.items()},
      title="top-1 accuracy",
      percent=True,
      along="severity; 0: as it is",
    )
    name = f"{start}relative_drop"
    lost = (
      f" {percent(values[name])} % of the accuracy is lost in the mean." if name in values else ""
    )
    what = start.removeprefix("val/").removesuffix("-corruptions-")
    parts.append(
      f"<h2>Corruptions: {escape(what)}</h2><p>The mean over all kinds and severities is"
      f" {percent(values[f'{start}mean_top1'])} %.{lost}</p>"
      f'<div class="grid two"><div class="card">{drawn}</div></div>'
    )
  return "".join(parts)


# Figures of the geometry over training: {title: metrics of the evaluator `geometry`}.
_GEOMETRY = {
  "modality gap: distance of the means": ("centroid_distance",),
  "alignment: squared distance of the pairs": ("alignment",),
  "uniformity": ("uniformity_img", "uniformity_txt"),
  "effective rank": ("effective_rank_img", "effective_rank_txt"),
  "cone: mean cosine within a modality": ("mean_offdiag_cosine_img", "mean_offdiag_cosine_txt"),
  "hubness: skewness of how often one is found": ("hubness_i2t", "hubness_t2i"),
}


def geometry_over_training(rows: Rows) -> str:
  """Returns the curves of each evaluator `geometry` that ran several times."""
  parts = []
  gap = "centroid_distance"
  for start in [name.removesuffix(gap) for name in final(rows) if name.endswith(gap)]:
    if start.startswith("ema/") or len(series(rows, f"{start}{gap}")[0]) < 2:
      continue
    cards = []
    for title, names in _GEOMETRY.items():
      lines = {name: series(rows, f"{start}{name}") for name in names}
      if lines := {name: line for name, line in lines.items() if line[0]}:
        cards.append(f'<div class="card">{figures.curves(lines, title=title)}</div>')
    what = readable(start.rstrip("/")).removeprefix("val") or "held-out pairs"
    parts.append(
      f'<h2>Geometry over training: {escape(what)}</h2><div class="grid two">{"".join(cards)}</div>'
    )
  return "".join(parts)


def absent(reason: str) -> str:
  """Returns why the page shows no samples."""
  return f"<h2>Samples</h2><p>The page shows no samples: {escape(reason)}</p>"


def geometry(pairs: Pairs) -> str:
  """Returns the similarity matrix of some pairs, and a PCA of both modalities with their gap."""
  some = np.linspace(0, len(pairs.zimg) - 1, min(MATRIX, len(pairs.zimg))).astype(int)
  sims = pairs.zimg @ pairs.ztxt.T
  same = np.asarray(pairs.captions)[:, None] == np.asarray(pairs.captions)[None]
  gap = float(np.linalg.norm(pairs.zimg.mean(0) - pairs.ztxt.mean(0)))
  numbers = {
    "modality gap: distance of the two means": f"{gap:.3f}",
    "mean cosine of matching pairs": f"{sims[same].mean():.3f}",
    "mean cosine of other pairs": f"{sims[~same].mean():.3f}" if (~same).any() else "–",
  }
  cells = "".join(f"<div><b>{v}</b>{escape(k)}</div>" for k, v in numbers.items())
  return (
    f"<h2>Geometry</h2><p>{escape(pairs.where)}. Left: similarities of {len(some)} of them; a"
    " well-trained model shows a bright diagonal on a dark background. Right: both modalities in"
    " the plane of their joint PCA. Lines join pairs; the arrow is the gap between the means.</p>"
    f'<div class="numbers">{cells}</div><div class="grid two">'
    f'<div class="card">{figures.heatmap(sims[np.ix_(some, some)])}</div>'
    f'<div class="card">{figures.sphere(pairs.zimg, pairs.ztxt)}</div></div>'
  )


def _image(pairs: Pairs, i: int) -> str:
  small = ' class="small"' if max(pairs.images[0].shape) <= 64 else ""
  caption = escape(pairs.captions[i], quote=True)
  return f'<img{small} src="{figures.thumbnail(pairs.images[i])}" alt="{caption}">'


def _shown(sims: np.ndarray, correct: Sequence[bool], n: int) -> list[int]:
  """The n most similar candidates; if no correct one is among them, the best one is the last."""
  order: list[int] = np.argsort(-sims, kind="stable").tolist()
  if any(correct[i] for i in order[:n]):
    return order[:n]
  return [*order[: n - 1], *[i for i in order if correct[i]][:1]]


def _image_card(pairs: Pairs, i: int, texts: list[str], sims: np.ndarray, rank: int) -> str:
  lines = "".join(
    f"<li{' class=hit' if texts[t] == pairs.captions[i] else ''}>"
    f'<span class="mono">{sims[t]:.2f}</span><span>{escape(texts[t])}</span></li>'
    for t in _shown(sims, [text == pairs.captions[i] for text in texts], 3)
  )
  return (
    f'<div class="card pair">{_image(pairs, i)}<div><div class="caption">'
    f'{escape(pairs.captions[i])}</div><div class="rank">rank of its caption: {rank}</div>'
    f"<ol>{lines}</ol></div></div>"
  )


def _text_card(pairs: Pairs, text: str, sims: np.ndarray, rank: int) -> str:
  results = "".join(
    f"<div{' class=hit' if pairs.captions[i] == text else ''}>{_image(pairs, i)}{sims[i]:.2f}</div>"
    for i in _shown(sims, [caption == text for caption in pairs.captions], 5)
  )
  return (
    f'<div class="card"><div class="caption">{escape(text)}</div>'
    f'<div class="rank">rank of its image: {rank}</div><div class="results">{results}</div></div>'
  )


def margins(sims: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns how clearly each query finds its positive.

  Args:
    sims: [Q, G], similarities of queries and candidates.
    positive: [Q, G], whether a candidate is correct.

  Returns:
    Margin [Q], the best correct similarity minus the best wrong one, and rank [Q] from 1.
  """
  own = np.where(positive, sims, -np.inf).max(1)
  others = np.where(positive, -np.inf, sims)
  return own - others.max(1), 1 + (others > own[:, None]).sum(1)


def retrieval(pairs: Pairs) -> str:
  """Returns the best and worst retrievals in both directions; equal captions count as one."""
  texts, first = np.unique(pairs.captions, return_index=True)
  if len(texts) < 2:
    return ""
  names = [str(text) for text in texts]
  sims = pairs.zimg @ pairs.ztxt[first].T
  positive = np.asarray(pairs.captions)[:, None] == texts[None]
  parts = [
    f"<h2>Retrieval</h2><p>Among {escape(pairs.where)}, with {len(names)} different captions,"
    " ordered by the rank of the correct match, then by its margin over the best wrong one. The"
    " correct match is green; if it is not in the top results, it is shown last.</p>"
  ]
  for direction, scores, correct in (
    ("image to text", sims, positive),
    ("text to image", sims.T, positive.T),
  ):
    margin, rank = margins(scores, correct)
    best = np.lexsort((-margin, rank))[:SHOWN]
    worst = np.lexsort((margin, -rank))[:SHOWN]
    for title, chosen in (("best", best), ("worst", worst)):
      cards = [
        _image_card(pairs, int(q), names, scores[q], int(rank[q]))
        if direction == "image to text"
        else _text_card(pairs, names[q], scores[q], int(rank[q]))
        for q in chosen
      ]
      parts.append(f'<h3>{direction}, {title}</h3><div class="pairs">{"".join(cards)}</div>')
  return "".join(parts)


def captions(pairs: Pairs) -> str:
  """Returns the captions that the model writes for some images, beside the true ones."""
  if not pairs.written:
    return ""
  cards = []
  for i, written in enumerate(pairs.written):
    lines = (
      ("data", pairs.captions[i]),
      ("greedy", written.greedy),
      (f"{BEAMS} beams", written.beams),
    )
    rows = "".join(
      f"<tr{' class=hit' if name == 'data' else ''}><th>{name}</th>"
      f"<td>{escape(text) or '(no word)'}</td></tr>"
      for name, text in lines
    )
    cards.append(f'<div class="card pair">{_image(pairs, i)}<table>{rows}</table></div>')
  return (
    "<h2>Captions</h2><p>The caption of the data is green; below it are those that the decoder of"
    f" the run writes: the most probable word at each place, and the best of {BEAMS} beams.</p>"
    f'<div class="pairs">{"".join(cards)}</div>'
  )


def segmentation(name: str, shown: Segmented) -> str:
  """Returns images, the classes of their places in the data, and those that the model finds."""
  colours = figures.class_colours(len(shown.names))
  cards = []
  for image, labels, found in zip(shown.images, shown.labels, shown.found):
    urls = {"image": figures.thumbnail(image)}
    urls |= {"labels": figures.class_map(labels, colours)}
    urls |= {"found": figures.class_map(found, colours)}
    known = labels >= 0
    share = percent(float((labels == found)[known].mean())) if known.any() else "0"
    pictures = "".join(
      f'<div><img src="{url}" alt="{what}">{what}</div>' for what, url in urls.items()
    )
    cards.append(
      f'<div class="card"><div class="rank">correct places: {share} %</div>'
      f'<div class="results">{pictures}</div></div>'
    )
  present = {*shown.labels.ravel().tolist(), *shown.found.ravel().tolist()} - {-1}
  names = "".join(
    f'<span><i style="background:rgb({",".join(map(str, colours[i]))})"></i>'
    f"{escape(shown.names[i])}</span>"
    for i in sorted(present)
  )
  return (
    f"<h2>Segmentation: {escape(name)}</h2><p>The first images of config.evals.{escape(name)}."
    " Each place has the colour of its class; grey places do not count.</p>"
    f'<div class="classes">{names}</div><div class="pairs">{"".join(cards)}</div>'
  )


def confusion(name: str, shown: Confusion) -> str:
  """Returns the classes that are confused most often, and those that are found least often."""
  names, count = shown.names, len(shown.label)
  rows = [
    (names[a], names[b], f"{n:,} of {images:,}", f"{percent(n / images)} %")
    for a, b, n, images in shown.pairs(CONFUSED)
  ]
  recalls = shown.recalls()
  there = np.flatnonzero(~np.isnan(recalls))
  least = there[np.argsort(recalls[there], kind="stable")][:CONFUSED]
  found = [(names[k], f"{percent(float(recalls[k]))} %") for k in least]
  without = len(names) - len(there)
  more = f" {without:,} of {len(names):,} classes have no image." if without else ""
  return (
    f"<h2>Classes: {escape(name)}</h2><p>{count:,} images of config.evals.{escape(name)}, and the"
    f" class whose texts each resembles most.{more}</p>"
    f'<div class="card">{table(("class", "taken for", "images", "share"), rows)}</div>'
    f'<div class="card">{table(("class", "found"), found, True)}</div>'
  )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
  """Returns an HTML table.

  Args:
    head: names of the columns.
    rows: the cells as text.
    numbers: whether all columns but the first hold numbers, which are right-aligned.
  """

  def line(cells: Sequence[str], tag: str) -> str:
    return (
      "<tr>"
      + "".join(
        f"<{tag}{' class=n' if numbers and i else ''}>{escape(str(cell))}</{tag}>"
        for i, cell in enumerate(cells)
      )
      + "</tr>"
    )

  return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def throughput(rows: Rows) -> str:
  """Returns median, least and most of each wall-clock metric over the run."""
  timed = sorted({name for row in rows for name in row if is_wall_clock(name)})
  body = []
  for name in timed:
    values = series(rows, name)[1]
    body.append((name, *(f"{x:,.4g}" for x in (np.median(values), min(values), max(values)))))
  if not body:
    return ""
  return (
    "<h2>Throughput</h2><p>Wall time between logs, without evaluation and saving.</p>"
    f'<div class="card">{table(("metric", "median", "least", "most"), body, True)}</div>'
  )


def everything(rows: Rows, values: Mapping[str, float], by_chance: Mapping[str, float]) -> str:
  """Returns each evaluation metric: first value, last value, chance level."""

  def cell(x: float | None) -> str:
    return "" if x is None else f"{x:.4f}" if isinstance(x, float) else f"{x:,}"

  body = [
    (name, cell(series(rows, name)[1][0]), cell(value), cell(by_chance.get(name)))
    for name, value in values.items()
  ]
  if not body:
    return ""
  return (
    "<h2>All evaluation metrics</h2>"
    f'<div class="card">{table(("metric", "first", "last", "chance"), body, True)}</div>'
  )


def details(run: Run) -> str:
  """Returns the config, the versions of code and packages, and the fingerprint of the data."""
  config = [(key, repr(value)) for key, value in tree.flatten(run.meta["config"]).items()]
  code = {
    "revision": run.meta["revision"],
    "data fingerprint": run.meta["data"],
    **run.meta["versions"],
  }
  return (
    f'<h2>Config</h2><div class="card mono">{table(("key", "value"), config)}</div>'
    f'<h2>Versions</h2><div class="card mono">{table(("name", "version"), [*code.items()])}</div>'
  )
