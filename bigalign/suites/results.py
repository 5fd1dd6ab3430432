"""Results of suites as a table, a page, CSV, and JSON in the form of CLIP_benchmark."""

from __future__ import annotations

import csv
import html
import io
import math
import pathlib
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.table

from bigalign.evals.chance import chance
from bigalign.suites.robustness import effective_robustness
from bigalign.suites.runner import Result

_DRAWS = 10_000  # of a bootstrap
# Metrics that are the share of hits among a number of samples, and the metric that holds it.
_SHARES = (
  (re.compile(r"(.*-)?(top\d+|accuracy|image_to_text_R@\d+)"), "num_samples"),
  (re.compile(r"(.*-)?text_to_image_R@\d+"), "num_captions"),
)
# Metrics of which less is better, and those that are no quality.
_LESS = re.compile(
  r"(.*-)?(ece(_rest.*)?|ood_fpr95|mean_rank|median_rank|.*_(mean|median)_rank|relative_drop"
  r"|group_gap_top\d)"
)
_NEUTRAL = re.compile(r"(.*-)?(num_.*|rejected|penalty|.*temperature|logit_scale|.*_samples)")
_TASKS = dict(zeroshot="zeroshot_classification", retrieval="zeroshot_retrieval")
_NAMES = (  # ours and CLIP_benchmark's
  (r"top(\d+)", r"acc\1"),
  (r"text_to_image_R@(\d+)", r"image_retrieval_recall@\1"),
  (r"image_to_text_R@(\d+)", r"text_retrieval_recall@\1"),
)


class Row(NamedTuple):
  """One metric of one task.

  Attributes:
    task: its name.
    metric: its name; "" if no model was evaluated.
    chance: of the metric; None if it is not known.
    values: {model: (value, low, high)}; the bounds are None for a metric without an interval.
    missing: {model: why it was not evaluated}.
  """

  task: str
  metric: str
  chance: float | None
  values: Mapping[str, tuple[float, float | None, float | None]]
  missing: Mapping[str, str]


def interval(metric: str, metrics: Mapping[str, float]) -> tuple[float, float] | None:
  """The bootstrap's 95 % interval of a metric that is a share of hits; None for another one.

  N hits and misses that are drawn again with replacement have a binomial number of hits, so the
  samples are not needed. Captions of one image count as independent.

  >>> interval("top1", {"top1": 0.5, "num_samples": 100})
  (0.4, 0.6)

  Args:
    metric: its name.
    metrics: all metrics of the task, with the number of samples.
  """
  for pattern, size in _SHARES:
    found = pattern.fullmatch(metric)
    sizes = [f"{found[1] or ''}{size}", size] if found else []
    count = next((int(metrics[name]) for name in sizes if name in metrics), 0)
    if count and not math.isnan(metrics[metric]):
      share = min(1.0, max(0.0, metrics[metric]))
      draws = np.random.default_rng(0).binomial(count, share, _DRAWS) / count
      low, high = np.quantile(draws, (0.025, 0.975)).tolist()
      return low, high
  return None


def rows_of(results: Sequence[Result]) -> list[Row]:
  """A row for each task and each metric of its score, or all of its metrics if it has no score."""
  rows = []
  for task in dict.fromkeys(result.task for result in results):
    own = [result for result in results if result.task == task]
    missing = {x.model: x.missing for x in own if x.missing}
    found = [x for x in own if not x.missing]
    names = dict.fromkeys(name for x in found for name in x.scored or x.metrics)
    for name in names or [""]:
      having = [x for x in found if name in x.metrics]
      bounds = {x.model: interval(name, x.metrics) or (None, None) for x in having}
      values = {x.model: (x.metrics[name], *bounds[x.model]) for x in having}
      level = _chance(having[0]).get(name) if having else None
      rows.append(Row(task, name, level, values, missing))
    beyond = _beyond(own, results)
    if beyond:
      rows.append(Row(task, "effective_robustness", None, beyond, missing))
  return rows


def _beyond(
  own: Sequence[Result], results: Sequence[Result]
) -> dict[str, tuple[float, float | None, float | None]]:
  """{model: its effective robustness} on a shifted task; {} if a line cannot be fitted."""
  scores = {(x.task, x.model): x.score for x in results if x.score is not None}
  pairs = {
    x.model: (scores[x.shift_of, x.model], x.score)
    for x in own
    if x.shift_of and x.score is not None and (x.shift_of, x.model) in scores
  }
  if not pairs:
    return {}
  beyond = effective_robustness(*np.array([*pairs.values()], np.float64).T)
  every = zip(pairs, beyond.tolist())
  return {model: (value, None, None) for model, value in every if not math.isnan(value)}


def _chance(result: Result) -> dict[str, float]:
  """{metric: value by chance} of the metrics of a result."""
  before = f"-{result.kind}-"
  named = chance({before + name: value for name, value in result.metrics.items()})
  return {name.removeprefix(before): value for name, value in named.items()}


def labels(models: Sequence[str]) -> dict[str, str]:
  """{model: the name of its folder}, or its whole path if several folders have one name.

  >>> labels(["runs/a", "runs/b/"])
  {'runs/a': 'a', 'runs/b/': 'b'}
  """
  short = {model: model.rstrip("/").rpartition("/")[2] for model in models}
  names = [*short.values()]
  return {model: name if names.count(name) == 1 else model for model, name in short.items()}


def means(results: Sequence[Result]) -> dict[str, tuple[float | None, int, int]]:
  """{model: (mean score, tasks with a score, all tasks that have one if they are evaluated)}."""
  found: dict[str, tuple[float | None, int, int]] = {}
  for model in dict.fromkeys(result.model for result in results):
    own = [x for x in results if x.model == model]
    scores = [x.score for x in own if x.score is not None]
    due = sum(x.due for x in own)
    found[model] = (sum(scores) / len(scores) if scores else None, len(scores), due)
  return found


def table(results: Sequence[Result]) -> rich.table.Table:
  """A row for each task and metric, a column for each model, next to chance."""
  models = list(dict.fromkeys(result.model for result in results))
  shown = rich.table.Table("task", "metric", box=rich.box.SIMPLE_HEAD)
  for model in labels(models).values():
    shown.add_column(model, justify="right", overflow="fold")
  shown.add_column("chance", justify="right", style="dim")
  for row in rows_of(results):
    cells = [_cell(row, model) for model in models]
    level = "" if row.chance is None else f"{row.chance:.4f}"
    shown.add_row(row.task, row.metric, *cells, level)
  shown.add_section()
  totals = means(results)
  counts = {f"{done} of {due}" for _, done, due in totals.values()}
  same = counts.pop() if len(counts) == 1 else ""
  values = [
    "" if mean is None else f"{mean:.4f}" + ("" if same else f" ({done} of {due})")
    for mean, done, due in (totals[model] for model in models)
  ]
  shown.add_row(f"mean of {same} tasks" if same else "mean (of tasks)", "score", *values, "")
  return shown


def _cell(row: Row, model: str) -> str:
  if model not in row.values:
    return "missing" if model in row.missing else ""
  value, low, high = row.values[model]
  return _shown(value) + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def _shown(value: float) -> str:
  return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def left_out(results: Sequence[Result]) -> list[str]:
  """Sentences that say which tasks were not evaluated, why, and how to get their data."""
  models = {result.model for result in results}
  why: dict[tuple[str, str, str], list[str]] = {}
  for x in results:
    if x.missing:
      why.setdefault((x.task, x.missing, x.get), []).append(x.model)
  lines = []
  for (task, reason, get), own in why.items():
    which = "" if {*own} == models else f" of {', '.join(own)}"
    how = f". Get its data with: {get}" if get else ""
    lines.append(f"{task}{which} was not evaluated: {reason}{how}")
  return lines


def clip_benchmark(results: Sequence[Result]) -> list[dict[str, Any]]:
  """One record for each task and model, as CLIP_benchmark writes them, with its names of metrics.

  A task that was not evaluated has no metrics, and says why as "missing".
  """
  records = []
  for result in results:
    record: dict[str, Any] = {
      "dataset": result.task,
      "model": result.model,
      "pretrained": "",
      "task": _TASKS.get(result.kind, result.kind),
      "metrics": {_theirs(name): value for name, value in result.metrics.items()},
      "language": "en",
    }
    if result.missing:
      record["missing"] = result.missing
    if result.score is not None:
      record["score"] = result.score
    records.append(record)
  return records


def _theirs(name: str) -> str:
  """CLIP_benchmark's name of a metric."""
  for ours, theirs in _NAMES:
    name = re.sub(rf"^{ours}$", theirs, name)
  return name


def as_csv(results: Sequence[Result]) -> str:
  """One line for each task, metric and model."""
  file = io.StringIO()
  writer = csv.writer(file, lineterminator="\n")
  writer.writerow(["task", "metric", "model", "value", "low", "high", "chance", "missing"])
  for row in rows_of(results):
    for model, (value, low, high) in row.values.items():
      writer.writerow([row.task, row.metric, model, value, low, high, row.chance, ""])
    for model, reason in row.missing.items():
      writer.writerow([row.task, row.metric, model, "", "", "", row.chance, reason])
  return file.getvalue()


def page(results: Sequence[Result], title: str) -> str:
  """A self-contained HTML page that compares models: the best value of each row is bold."""
  models = list(dict.fromkeys(result.model for result in results))
  lines = []
  for row in rows_of(results):
    best = _best(row)
    cells = []
    for model in models:
      if model not in row.values:
        why = html.escape(row.missing.get(model, ""))
        cells.append(f'<td class="missing" title="{why}">{"missing" if why else ""}</td>')
        continue
      value, low, high = row.values[model]
      mark = ' class="best"' if value == best and len(models) > 1 else ""
      bounds = "" if low is None else f"<small>{low:.3f} to {high:.3f}</small>"
      bar = "" if low is None else f'<i style="width:{100 * value:.1f}%"></i>'
      cells.append(f"<td{mark}>{bar}<b>{_shown(value)}</b>{bounds}</td>")
    level = "" if row.chance is None else f"{row.chance:.4f}"
    names = f"<th>{html.escape(row.task)}</th><td>{html.escape(row.metric)}</td>"
    lines.append(f"<tr>{names}{''.join(cells)}<td>{level}</td></tr>")
  totals = means(results)
  last = "".join(
    f"<td><b>{'' if mean is None else f'{mean:.4f}'}</b><small>{done} of {due} tasks</small></td>"
    for mean, done, due in (totals[model] for model in models)
  )
  reasons = "".join(f"<li>{html.escape(line)}</li>" for line in left_out(results))
  template = (pathlib.Path(__file__).parent / "page.html").read_text("utf-8")
  return string.Template(template).substitute(
    title=html.escape(title),
    models="".join(f"<th>{html.escape(name)}</th>" for name in labels(models).values()),
    rows="\n".join(lines),
    means=last,
    left_out=f"<h2>Not evaluated</h2><ul>{reasons}</ul>" if reasons else "",
  )


def _best(row: Row) -> float | None:
  """The best value of a row; None for a metric that is no quality."""
  values = [value for value, _, _ in row.values.values() if not math.isnan(value)]
  if not values or _NEUTRAL.fullmatch(row.metric):
    return None
  return min(values) if _LESS.fullmatch(row.metric) else max(values)
