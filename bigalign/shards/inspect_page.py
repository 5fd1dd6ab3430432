"""The HTML page of bigalign inspect; all text from the data is escaped."""

from __future__ import annotations

import pathlib
import string
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bigalign.data.image.decode import decode
from bigalign.data.sources.base import Spec, open_spec
from bigalign.report.figures import histogram, thumbnail
from bigalign.shards.sample_stats import SampleStats, captions

SHEET = 60  # samples on the contact sheet
FIELDS = 4  # caption fields shown for each of them, one caption each
BAD = 40  # bad samples that are listed
SHOWN = 240  # characters of a text
THUMBNAIL = 224  # pixels


def page(
  figures: Mapping[str, Any], samples: Sequence[SampleStats], spec: Spec, language: str | None
) -> str:
  """Returns the complete page, which contains no links.

  Args:
    figures: from inspect.inspect.
    samples: what the figures were computed from.
    spec: the source.
    language: the field that holds the language of the captions, or None.
  """
  body = "\n".join(
    (
      _header(figures),
      _headline(figures),
      _speed(figures.get("throughput")),
      _images(figures, samples),
      _captions(figures, samples),
      _bad(figures, samples),
      _sheet(samples, spec, language),
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
  """Returns an HTML table.

  Args:
    head: names of the columns; without any, no head.
    rows: cells of text or numbers.
    numbers: right-align all columns but the first.
  """

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
  """A fraction in percent with three significant digits."""
  return f"{100 * share:.3g}"


def _header(figures: Mapping[str, Any]) -> str:
  total, read = figures["samples"], figures["looked_at"]
  scope = (
    "All samples were read."
    if read == total
    else (
      f"Figures are of {read:,} samples, evenly spread over the source; they are the same ones each"
      " time."
    )
  )
  return (
    f"<h1>{escape(_cut(figures['source']))}</h1><div class=facts><span>samples"
    f" <b>{total:,}</b></span><span>read <b>{read:,}</b></span></div><p>{scope}</p>"
  )


def _headline(figures: Mapping[str, Any]) -> str:
  read, partial = figures["looked_at"], figures["looked_at"] < figures["samples"]
  bad = sum(figures["bad"].values())
  within = " among the samples read; the source has more" if partial else ""
  images, texts = figures["repeated_images"], figures["repeated_captions"]
  cards = [
    ("unusable samples", _share(bad / read), "%", f"{bad:,} of {read:,}"),
    ("duplicate images", _share(images), "%", f"equal bytes{within}"),
    ("duplicate captions", _share(texts), "%", f"first caption of each sample{within}"),
  ]
  if figures["images"]["width"]:
    side = figures["images"]["shorter_side"]
    cards.append(
      (
        "shorter side",
        f"{side['median']:,.0f}",
        "pixels",
        f"median; 98 % are from {side['1%']:,.0f} to {side['99%']:,.0f}",
      )
    )
  rates = figures.get("throughput", {})
  if "decoded" in rates:
    cards.append(("data loader", f"{rates['decoded']:,.0f}", "images/s", _setting(rates)))
  if "hosts" in rates:
    cards.append(
      (
        "hosts like this one",
        f"{rates['hosts']:,}",
        "",
        f"for {rates['images_per_second']:,.0f} images/s",
      )
    )
  return (
    '<div class="grid">'
    + "".join(
      f'<div class="card figure"><div class="label">{label}</div><div class="value">{value}'
      f'<small>{unit}</small></div><div class="note">{note}</div></div>'
      for label, value, unit, note in cards
    )
    + "</div>"
  )


def _setting(rates: Mapping[str, Any]) -> str:
  workers = rates["workers"]
  return f"{workers} worker{'' if workers == 1 else 's'}, {rates['image_size']} pixels"


def _speed(rates: Mapping[str, Any] | None) -> str:
  if rates is None:
    return ""
  if "problem" in rates:
    return f"<h2>Throughput</h2><p>Not measured: {escape(_cut(rates['problem']))}</p>"
  note = (
    "Samples per second of the data loader on this host, in the order of training. Small sources"
    " are read repeatedly, from memory; a first pass over a large source may be slower."
  )
  rows = [
    ("reading only", rates["read"]),
    ("reading, decoding, cropping, tokenising", rates["decoded"]),
  ]
  return (
    f"<h2>Throughput</h2><p>{note}</p><div class=card>"
    f"{table((_setting(rates), 'per second'), [(what, round(n)) for what, n in rows])}</div>"
  )


def _quantiles(rows: Mapping[str, Mapping[str, float]]) -> str:
  """A card with a table, a row for each name."""
  head = ["", *next(iter(rows.values()))]
  body = [[name.replace("_", " "), *row.values()] for name, row in rows.items()]
  return f'<div class="card below">{table(head, body)}</div>'


def _shares(title: str, counts: Mapping[str, int]) -> str:
  total = sum(counts.values())
  rows = [(name, n, f"{_share(n / total)} %") for name, n in list(counts.items())[:20]]
  return f"<div class=card><h3>{title}</h3>{table(('', '', ''), rows)}</div>" if rows else ""


def _images(figures: Mapping[str, Any], samples: Sequence[SampleStats]) -> str:
  decoded = [sample for sample in samples if sample.width]
  if not decoded:
    return ""
  charts: list[tuple[str, list[float]]] = [
    ("shorter side, pixels", [min(x.width, x.height) for x in decoded]),
    ("width / height", [x.width / x.height for x in decoded]),
    ("size, bytes", [x.size for x in decoded]),
  ]
  return (
    "<h2>Images</h2><div class=grid>"
    + _charts(charts)
    + _shares("formats, by content", figures["kinds"])
    + f"</div>{_quantiles(figures['images'])}"
  )


def _charts(charts: list[tuple[str, list[float]]]) -> str:
  return "".join(
    f"<div class=card>{histogram(values, title=title)}</div>" for title, values in charts
  )


def _captions(figures: Mapping[str, Any], samples: Sequence[SampleStats]) -> str:
  lengths: list[float] = [n for x in samples for each in x.lengths.values() for n in each]
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
    "<h2>Captions</h2><p>The script of a caption is the one of most letters at its beginning; it"
    " does not determine the language.</p><div class=grid>"
    + _charts([("characters", lengths)])
    + _shares("scripts", figures["scripts"])
    + _shares("languages, from the data", figures["languages"])
    + "</div><h3>By field: share of samples that have it, captions per such sample, lengths in"
    + f" characters</h3>{_quantiles(rows)}"
    + _frequent(figures["frequent"])
  )


def _frequent(counts: Mapping[str, int]) -> str:
  return (
    (
      f"<h3>Most frequent first captions</h3><div class=card>"
      f"{table(('', 'samples'), [*counts.items()])}</div>"
    )
    if counts
    else ""
  )


def _bad(figures: Mapping[str, Any], samples: Sequence[SampleStats]) -> str:
  if not figures["bad"]:
    return ""
  rows = [(x.position, x.key, x.reason, x.detail) for x in samples if x.reason][:BAD]
  return (
    "<h2>Unusable samples</h2><p>Training replaces each by another sample, and counts it."
    f'</p><div class=grid>{_shares("reasons", figures["bad"])}</div><div class="card below">'
    f"{table(('index', 'key', 'reason', 'details'), rows, numbers=False)}</div>"
  )


def _sheet(samples: Sequence[SampleStats], spec: Spec, language: str | None) -> str:
  usable = [sample for sample in samples if not sample.reason]
  count = min(SHEET, len(usable))
  chosen = [usable[k * len(usable) // count] for k in range(count)]
  cards = "".join(_card(sample, spec, language) for sample in chosen)
  return (
    f"<h2>Contact sheet</h2><p>{count} usable sample{'' if count == 1 else 's'}, evenly spread.</p>"
    f'<div class="sheet">{cards}</div>'
  )


def _card(sample: SampleStats, spec: Spec, language: str | None) -> str:
  record = open_spec(spec)[sample.position]
  texts, languages = captions(record, spec, language)
  columns = [column for column in texts.values() if column]
  firsts = list(dict.fromkeys(column[0] for column in columns))[:FIELDS]
  lines = "".join(
    f'<div class="caption" dir="auto">{escape(_cut(text))}{_rest(text)}</div>' for text in firsts
  )
  left = sum(map(len, columns)) - len(firsts)
  more = f"{left} more · " if left else ""
  about = " · ".join((f"{sample.width} × {sample.height}", *languages[:1], _cut(sample.key)))
  return (
    f'<div class="card"><img src="{thumbnail(decode(record["image"]), THUMBNAIL)}"'
    f' alt="{escape(_cut(firsts[0]))}">{lines}'
    f'<div class="rank">{more}{escape(about)}</div></div>'
  )


def _rest(text: str) -> str:
  return f' <span class="rank">{len(text):,} characters</span>' if len(text) > SHOWN else ""
