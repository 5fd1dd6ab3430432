"""The page of bigalign inspect; whatever comes from the data is escaped."""

from __future__ import annotations

import pathlib
import string
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bigalign.data.image.decode import decode
from bigalign.data.sources.base import Spec, open_spec
from bigalign.report.figures import histogram, thumbnail
from bigalign.shards.facts import Fact, captions

SHEET = 60  # samples on the contact sheet
FIELDS = 4  # of which a sample there shows the first caption
BAD = 40  # bad samples that are told one by one
SHOWN = 240  # characters of a text
THUMBNAIL = 224  # pixels


def page(
  figures: Mapping[str, Any], found: Sequence[Fact], spec: Spec, language: str | None
) -> str:
  """The whole page; nothing in it points outside."""
  body = "\n".join(
    (
      _header(figures),
      _headline(figures),
      _speed(figures.get("throughput")),
      _images(figures, found),
      _captions(figures, found),
      _bad(figures, found),
      _sheet(found, spec, language),
    )
  )
  template = (
    pathlib.Path(__file__)
    .parents[1]
    .joinpath("report", "template.html")
    .read_text(encoding="utf-8")
  )
  return string.Template(template).substitute(
    title=escape(f"{figures['source']} · bigalign inspect"), body=body
  )


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, numbers: bool = True) -> str:
  """Cells of text or numbers; with `numbers` all but the first column stand right."""

  def line(cells: Sequence[Any], tag: str) -> str:
    return (
      "<tr>"
      + "".join(
        f'<{tag} dir="auto"{" class=n" if numbers and i else ""}>{escape(_cell(cell))}</{tag}>'
        for i, cell in enumerate(cells)
      )
      + "</tr>"
    )

  top = line(head, "th") if any(head) else ""
  return f"<table>{top}{''.join(line(row, 'td') for row in rows)}</table>"


def _cell(value: Any) -> str:
  if isinstance(value, float):
    return f"{value:,.2f}" if value % 1 else f"{value:,.0f}"
  return f"{value:,}" if isinstance(value, int) else _cut(str(value))


def _cut(text: str) -> str:
  return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _share(share: float) -> str:
  """In percent, with digits also where it is small."""
  return f"{100 * share:.3g}"


def _header(figures: Mapping[str, Any]) -> str:
  total, looked = figures["samples"], figures["looked_at"]
  told = (
    "All samples were looked at."
    if looked == total
    else (
      f"All but the number of samples is of {looked:,} of them, spread evenly over the whole, the"
      " same ones each time."
    )
  )
  return (
    f"<h1>{escape(_cut(figures['source']))}</h1><div class=facts><span>samples"
    f" <b>{total:,}</b></span><span>looked at <b>{looked:,}</b></span></div><p>{told}</p>"
  )


def _headline(figures: Mapping[str, Any]) -> str:
  looked, sample = figures["looked_at"], figures["looked_at"] < figures["samples"]
  bad = sum(figures["bad"].values())
  within = " among those looked at; the whole holds more" if sample else ""
  images, texts = figures["repeated_images"], figures["repeated_captions"]
  cards = [
    ("samples that cannot be used", _share(bad / looked), "%", f"{bad:,} of {looked:,}"),
    ("images that were there before", _share(images), "%", f"the same bytes{within}"),
    ("captions that were there before", _share(texts), "%", f"the first of each{within}"),
  ]
  if figures["images"]["width"]:
    side = figures["images"]["shorter_side"]
    cards.append(
      (
        "shorter side",
        f"{side['median']:,.0f}",
        "pixels",
        f"median; {side['1%']:,.0f} to {side['99%']:,.0f} are 98 %",
      )
    )
  rates = figures.get("throughput", {})
  if "decoded" in rates:
    cards.append(("loader", f"{rates['decoded']:,.0f}", "images/s", _beside(rates)))
  if "hosts" in rates:
    cards.append(
      (
        "hosts such as this one",
        f"{rates['hosts']:,}",
        "",
        f"for {rates['images_per_second']:,.0f} images/s",
      )
    )
  return (
    '<div class="grid">'
    + "".join(
      f'<div class="card figure"><div class="label">{label}</div><div class="value">{value}'
      f'<small>{unit}</small></div><div class="beside">{beside}</div></div>'
      for label, value, unit, beside in cards
    )
    + "</div>"
  )


def _beside(rates: Mapping[str, Any]) -> str:
  return f"{rates['workers']} workers, {rates['image_size']} pixels"


def _speed(rates: Mapping[str, Any] | None) -> str:
  if rates is None:
    return ""
  if "problem" in rates:
    return f"<h2>Throughput</h2><p>Not measured: {escape(_cut(rates['problem']))}</p>"
  told = (
    "Samples a second that this host gives to training, in training's order. Small sources are read"
    " again and again, from memory; a first pass over large ones may be slower."
  )
  rows = [("read only", rates["read"]), ("read, decoded, cropped, tokenised", rates["decoded"])]
  return (
    f"<h2>Throughput</h2><p>{told}</p><div class=card>"
    f"{table((_beside(rates), 'a second'), [(what, round(n)) for what, n in rows])}</div>"
  )


def _quantiles(rows: Mapping[str, Mapping[str, float]]) -> str:
  """A card below others with a line for each name."""
  head = ["", *next(iter(rows.values()))]
  body = [[name.replace("_", " "), *row.values()] for name, row in rows.items()]
  return f'<div class="card below">{table(head, body)}</div>'


def _shares(title: str, counts: Mapping[str, int]) -> str:
  total = sum(counts.values())
  rows = [(name, n, f"{_share(n / total)} %") for name, n in list(counts.items())[:20]]
  return f"<div class=card><h3>{title}</h3>{table(('', '', ''), rows)}</div>" if rows else ""


def _images(figures: Mapping[str, Any], found: Sequence[Fact]) -> str:
  whole = [fact for fact in found if fact.width]
  if not whole:
    return ""
  charts: list[tuple[str, list[float]]] = [
    ("shorter side in pixels", [min(fact.width, fact.height) for fact in whole]),
    ("width / height", [fact.width / fact.height for fact in whole]),
    ("bytes", [fact.size for fact in whole]),
  ]
  return (
    "<h2>Images</h2><div class=grid>"
    + _charts(charts)
    + _shares("kinds, by content", figures["kinds"])
    + f"</div>{_quantiles(figures['images'])}"
  )


def _charts(charts: list[tuple[str, list[float]]]) -> str:
  return "".join(
    f"<div class=card>{histogram(values, title=title)}</div>" for title, values in charts
  )


def _captions(figures: Mapping[str, Any], found: Sequence[Fact]) -> str:
  lengths: list[float] = [n for fact in found for each in fact.lengths.values() for n in each]
  if not lengths:
    return ""
  rows = {
    name: {
      "samples": f"{_share(field['samples_with_one'])} %",
      "captions": field["per_sample"],
      **field["characters"],
    }
    for name, field in figures["captions"].items()
    if field["characters"]
  }
  return (
    "<h2>Captions</h2><p>A caption counts for the script that most letters of its beginning are of;"
    " a script is no language.</p><div class=grid>"
    + _charts([("characters", lengths)])
    + _shares("scripts", figures["scripts"])
    + _shares("languages, as the data say", figures["languages"])
    + "</div><h3>Of each field: samples that have it, captions of such a sample, and their lengths"
    + f" in characters</h3>{_quantiles(rows)}"
    + _frequent(figures["frequent"])
  )


def _frequent(counts: Mapping[str, int]) -> str:
  return (
    (
      f"<h3>The most frequent first captions</h3><div class=card>"
      f"{table(('', 'samples'), [*counts.items()])}</div>"
    )
    if counts
    else ""
  )


def _bad(figures: Mapping[str, Any], found: Sequence[Fact]) -> str:
  if not figures["bad"]:
    return ""
  rows = [(fact.place, fact.key, fact.reason, fact.detail) for fact in found if fact.reason][:BAD]
  return (
    "<h2>Bad samples</h2><p>Training puts another sample in the place of each, and counts it."
    f'</p><div class=grid>{_shares("reasons", figures["bad"])}</div><div class="card below">'
    f"{table(('index', 'key', 'reason', 'what was found'), rows, numbers=False)}</div>"
  )


def _sheet(found: Sequence[Fact], spec: Spec, language: str | None) -> str:
  usable = [fact for fact in found if not fact.reason]
  count = min(SHEET, len(usable))
  chosen = [usable[k * len(usable) // count] for k in range(count)]
  cards = "".join(_card(fact, spec, language) for fact in chosen)
  return (
    f"<h2>Contact sheet</h2><p>{count} of the samples that can be used, evenly spread.</p>"
    f'<div class="sheet">{cards}</div>'
  )


def _card(fact: Fact, spec: Spec, language: str | None) -> str:
  record = open_spec(spec)[fact.place]
  texts, spoken = captions(record, spec, language)
  columns = [column for column in texts.values() if column]
  firsts = list(dict.fromkeys(column[0] for column in columns))[:FIELDS]
  lines = "".join(
    f'<div class="caption" dir="auto">{escape(_cut(text))}{_rest(text)}</div>' for text in firsts
  )
  left = sum(map(len, columns)) - len(firsts)
  more = f"{left} more · " if left else ""
  about = " · ".join((f"{fact.width} × {fact.height}", *spoken[:1], _cut(fact.key)))
  return (
    f'<div class="card"><img src="{thumbnail(decode(record["image"]), THUMBNAIL)}"'
    f' alt="{escape(_cut(firsts[0]))}">{lines}'
    f'<div class="rank">{more}{escape(about)}</div></div>'
  )


def _rest(text: str) -> str:
  return f' <span class="rank">{len(text):,} characters</span>' if len(text) > SHOWN else ""
