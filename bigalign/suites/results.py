"""Results of suites as a table, a page, CSV, and JSON in the form of CLIP_benchmark."""

from __future__ import annotations

import csv
import html
import io
import pathlib
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.table

from bigalign.evals.chance import chance
from bigalign.suites.runner import Result

_DRAWS = 10_000  # of a bootstrap
# Metrics that are the share of hits among a number of samples, and the metric that holds it.
_SHARES = (
  (re.compile(r"top\d+|(image_to_text)_R@\d+"), "num_samples"),
  (re.compile(r"text_to_image_R@\d+"), "num_captions"),
)
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
    if pattern.fullmatch(metric) and size in metrics:
      count, share = int(metrics[size]), min(1.0, max(0.0, metrics[metric]))
      draws = np.random.default_rng(0).binomial(count, share, _DRAWS) / count
      low, high = np.quantile(draws, (0.025, 0.975)).tolist()
      return low, high
  return None


def rows_of(results: Sequence[Result], metrics: Mapping[str, Sequence[str]]) -> list[Row]:
  """A row for each task and each metric that its suite names, in order.

  Args:
    results: of the runner.
    metrics: {task: metrics of its score}; a task without any has all of its metrics.
  """
  rows = []
  for task in dict.fromkeys(result.task for result in results):
    own = [result for result in results if result.task == task]
    missing = {x.model: x.missing for x in own if x.missing}
    found = [x for x in own if not x.missing]
    names = metrics.get(task) or (list(found[0].metrics) if found else [])
    for name in names if found else [""]:
      values = {}
      for x in found:
        low, high = interval(name, x.metrics) or (None, None)
        values[x.model] = (x.metrics[name], low, high)
      level = _chance(found[0].metrics).get(name) if found else None
      rows.append(Row(task, name, level, values, missing))
  return rows


def _chance(metrics: Mapping[str, float]) -> dict[str, float]:
  """{metric: value by chance} of metrics without the name of their task."""
  named = chance({f"-{name}": value for name, value in metrics.items()})
  return {name[1:]: value for name, value in named.items()}


def labels(models: Sequence[str]) -> dict[str, str]:
  """{model: the name of its folder}, or its whole path if several folders have one name.

  >>> labels(["runs/a", "runs/b/"])
  {'runs/a': 'a', 'runs/b/': 'b'}
  """
  short = {model: model.rstrip("/").rpartition("/")[2] for model in models}
  names = [*short.values()]
  return {model: name if names.count(name) == 1 else model for model, name in short.items()}


def means(results: Sequence[Result]) -> dict[str, tuple[float | None, int, int]]:
  """{model: (mean score, tasks with a score, all tasks that should have one)}."""
  found: dict[str, tuple[float | None, int, int]] = {}
  for model in dict.fromkeys(result.model for result in results):
    own = [x for x in results if x.model == model]
    scores = [x.score for x in own if x.score is not None]
    due = sum(1 for x in own if x.missing or x.score is not None)
    found[model] = (sum(scores) / len(scores) if scores else None, len(scores), due)
  return found


def table(results: Sequence[Result], metrics: Mapping[str, Sequence[str]]) -> rich.table.Table:
  """A row for each task and metric, a column for each model, next to chance."""
  models = list(dict.fromkeys(result.model for result in results))
  shown = rich.table.Table("task", "metric", box=rich.box.SIMPLE_HEAD)
  for model in labels(models).values():
    shown.add_column(model, justify="right", overflow="fold")
  shown.add_column("chance", justify="right", style="dim")
  for row in rows_of(results, metrics):
    cells = [_cell(row, model) for model in models]
    level = "" if row.chance is None else f"{row.chance:.4f}"
    shown.add_row(row.task, row.metric, *cells, level)
  shown.add_section()
  totals = means(results)
  counts = {(done, due) for _, done, due in totals.values()}
  done, due = next(iter(counts)) if len(counts) == 1 else (0, 0)
  label = f"mean of {done} of {due} tasks" if due else "mean of the tasks of each model"
  values = [totals[model][0] for model in models]
  shown.add_row(label, "score", *("" if x is None else f"{x:.4f}" for x in values), "")
  return shown


def _cell(row: Row, model: str) -> str:
  if model in row.missing:
    return "missing"
  value, low, high = row.values[model]
  if not isinstance(value, float):
    return f"{value:,}"
  return f"{value:.4f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


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


def as_csv(results: Sequence[Result], metrics: Mapping[str, Sequence[str]]) -> str:
  """One line for each task, metric and model."""
  file = io.StringIO()
  writer = csv.writer(file, lineterminator="\n")
  writer.writerow(["task", "metric", "model", "value", "low", "high", "chance", "missing"])
  for row in rows_of(results, metrics):
    for model, (value, low, high) in row.values.items():
      writer.writerow([row.task, row.metric, model, value, low, high, row.chance, ""])
    for model, reason in row.missing.items():
      writer.writerow([row.task, row.metric, model, "", "", "", row.chance, reason])
  return file.getvalue()


def page(results: Sequence[Result], metrics: Mapping[str, Sequence[str]], title: str) -> str:
  """A self-contained HTML page that compares models: the best value of each row is bold."""
  models = list(dict.fromkeys(result.model for result in results))
  lines = []
  for row in rows_of(results, metrics):
    best = max((x[0] for x in row.values.values()), default=None)
    cells = []
    for model in models:
      if model in row.missing:
        cells.append(f'<td class="missing" title="{html.escape(row.missing[model])}">missing</td>')
        continue
      value, low, high = row.values[model]
      mark = ' class="best"' if value == best and len(models) > 1 else ""
      bounds = "" if low is None else f"<small>{low:.3f} to {high:.3f}</small>"
      share = min(1.0, max(0.0, value)) if isinstance(value, float) else 0.0
      bar = f'<i style="width:{100 * share:.1f}%"></i>'
      shown = f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
      cells.append(f"<td{mark}>{bar}<b>{shown}</b>{bounds}</td>")
    level = "" if row.chance is None else f"{row.chance:.4f}"
    names = f"<th>{html.escape(row.task)}</th><td>{html.escape(row.metric)}</td>"
    lines.append(f"<tr>{names}{''.join(cells)}<td>{level}</td></tr>")
  totals = means(results)
  last = "".join(
    f"<td><b>{'' if mean is None else f'{mean:.4f}'}</b><small>{done} of {due} tasks</small></td>"
    for mean, done, due in (totals[model] for model in models)
  )
  reasons = {(x.task, x.missing, x.get) for x in results if x.missing}
  left_out = "".join(
    f"<li><b>{html.escape(task)}</b>: {html.escape(why)}"
    + (f"<br>Get it with <code>{html.escape(get)}</code>" if get else "")
    + "</li>"
    for task, why, get in sorted(reasons)
  )
  template = string.Template((pathlib.Path(__file__).parent / "page.html").read_text())
  return template.substitute(
    title=html.escape(title),
    models="".join(f"<th>{html.escape(name)}</th>" for name in labels(models).values()),
    rows="\n".join(lines),
    means=last,
    left_out=f"<h2>Not evaluated</h2><ul>{left_out}</ul>" if left_out else "",
  )
