"""Averages the weights of models: bigalign merge runs/a runs/b --alpha=0.5 --out=runs/merged

WiSE-FT, https://arxiv.org/abs/2109.01903, and model soups, https://arxiv.org/abs/2203.05482. The
result is the folder of a run with one checkpoint, because evaluate, export, bigalign.load and
config.model.init all read runs, with tokenizer, views and evaluators; `bigalign export` writes the
other formats.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.box
import rich.table
from absl import logging

from bigalign import tree
from bigalign.evals import Evaluator, make_evaluators
from bigalign.evaluate import Run, data_evals, evaluators_with_data, measure
from bigalign.merge.average import Arrays, Mean, interpolated
from bigalign.merge.members import as_in, check_new, on_host, opened, write
from bigalign.run import errors, parsers, preemption, progress, runtime, tables

Open = Callable[[str], Run]
Scores = dict[str, float]


def merge(
  first: str,
  second: str,
  alpha: float,
  out: str | pathlib.Path,
  *,
  step: int | str = "latest",
  ema: bool = False,
) -> None:
  """Writes (1 - alpha) * first + alpha * second; config and tokenizer are those of the second.

  Args:
    first: a run, or a folder of another library.
    second: another one.
    alpha: share of the second.
    out: folder of the result; new or empty.
    step: of runs, which checkpoint.
    ema: of runs, whether the running averages are merged.

  Raises:
    ValueError: for models with other parameters, by name.
    FileExistsError: if the folder is not empty.
  """
  check_new(pathlib.Path(out).expanduser())
  one, other = (opened(x, step, ema) for x in (first, second))
  arrays = interpolated(on_host(one), on_host(other), alpha, (first, second))
  write(out, other, arrays, _about([one, other], ema, alpha=alpha))


def sweep(
  first: str,
  second: str,
  alphas: Sequence[float],
  *,
  evals: Mapping[str, Any] | None = None,
  step: int | str = "latest",
  ema: bool = False,
) -> dict[float, Scores]:
  """{alpha: {metric: value}} of (1 - alpha) * first + alpha * second, one after the other.

  Args:
    evals: as of evaluate.evaluate; None: those of the second's config.

  Other arguments and errors are those of `merge`.
  """
  one, other = (opened(x, step, ema) for x in (first, second))
  arrays = on_host(one), on_host(other)
  evaluators = _evaluators(other, evals)
  scores = {}
  for alpha in progress.track(alphas, "alphas", len(alphas), unit="models"):
    mixed = as_in(other.params, interpolated(*arrays, alpha, (first, second)))
    scores[alpha] = measure(other._replace(params=mixed), evaluators)
  return scores


def soup(
  names: Sequence[str],
  out: str | pathlib.Path,
  *,
  step: int | str = "latest",
  ema: bool = False,
) -> None:
  """Writes the mean of several models; config and tokenizer are those of the first.

  Args:
    names: runs, or folders of other libraries; one of them is in memory at a time.

  Other arguments and errors are those of `merge`.
  """
  check_new(pathlib.Path(out).expanduser())
  mean, members = Mean(), []
  for name in names:
    run = opened(name, step, ema)
    mean.add(on_host(run), name)
    members.append(run._replace(params={}))
  write(out, members[0], mean.arrays(), _about(members, ema))


def greedy_soup(
  names: Sequence[str],
  out: str | pathlib.Path,
  *,
  metric: str = "",
  mode: str = "max",
  evals: Mapping[str, Any] | None = None,
  step: int | str = "latest",
  ema: bool = False,
) -> list[dict[str, Any]]:
  """Writes the mean of those models that do not make it worse, the best model first.

  The metric should be one of held-out data that is not reported.

  Args:
    metric: what decides; "": config.keep.best of the first model.
    mode: "max" or "min": which value is better.

  Other arguments and errors are those of `soup` and `sweep`.

  Returns:
    For each model, the best first: its name, its score, the score of the mean with it, and whether
    it is a part of the result.
  """
  check_new(pathlib.Path(out).expanduser())
  home = opened(names[0], step, ema)
  if not metric:
    keep = home.config.keep
    metric, mode = keep.option("best") or "", keep.option("mode")
  evaluators = _evaluators(home, evals)
  sign = 1 if mode == "max" else -1

  def score(arrays: Arrays) -> float:
    scores = measure(home._replace(params=as_in(home.params, arrays)), evaluators)
    if metric not in scores:
      raise ValueError(
        f"--metric={metric!r}: no such metric.{tree.nearest(metric, scores)} Known:"
        f" {tree.shown(scores)}"
      )
    return scores[metric]

  alone = {}
  for name in progress.track(names, "models", len(names), unit="models"):
    alone[name] = score(on_host(home if name == names[0] else opened(name, step, ema)))
  rows: list[dict[str, Any]] = []
  best: float | None = None
  chosen: list[str] = []
  for name in sorted(names, key=lambda name: -sign * alone[name]):
    mean = Mean()
    for member in (*chosen, name):
      mean.add(on_host(opened(member, step, ema)), member)
    value = score(mean.arrays())
    taken = best is None or sign * value >= sign * best
    if taken:
      chosen, best = [*chosen, name], value
    rows.append({"model": name, "alone": alone[name], "mean": value, "taken": taken})
    logging.info("%s: %.4f alone, %.4f in the mean: %s", name, alone[name], value, taken)
  mean, members = Mean(), []
  for name in chosen:
    run = opened(name, step, ema)
    mean.add(on_host(run), name)
    members.append(run._replace(params={}))
  write(out, members[0], mean.arrays(), _about(members, ema, metric=metric, greedy=rows))
  return rows


def parse_alphas(text: str) -> list[float]:
  """Numbers from 0 to 1; "..." continues the first two up to the one that follows.

  >>> parse_alphas("0,0.25,...,1")
  [0.0, 0.25, 0.5, 0.75, 1.0]

  Raises:
    ValueError: for something else.
  """
  words = [word.strip() for word in text.split(",")]
  problem = f"--alphas={text}: write numbers from 0 to 1, such as 0,0.5,1 or 0,0.1,...,1"
  try:
    numbers = [float(word) for word in words if word != "..."]
  except ValueError as error:
    raise ValueError(problem) from error
  if "..." in words:
    if len(words) != 4 or words[2] != "..." or not numbers[0] < numbers[1] < numbers[2]:
      raise ValueError(problem)
    first, second, last = numbers
    count = round((last - first) / (second - first))
    numbers = [round(first + i * (last - first) / count, 12) for i in range(count + 1)]
  if not numbers or not all(0 <= x <= 1 for x in numbers):
    raise ValueError(problem)
  return numbers


def _about(members: Sequence[Run], ema: bool, **how: Any) -> dict[str, Any]:
  """How a model was merged, for the record of its folder."""
  return {"from": [{"run": x.address, "step": x.step, "ema": ema} for x in members], **how}


def _evaluators(run: Run, evals: Mapping[str, Any] | None) -> dict[str, Evaluator]:
  """The evaluators of a run, or others."""
  if evals:
    return make_evaluators(evals, mesh=run.mesh, data=run.config.data, **run.embed)
  if not run.config.evals:
    raise ValueError(
      f"{run.address} has no config.evals; give --retrieval SHARDS or --zeroshot DIR"
    )
  return evaluators_with_data(run)[0]


def _sweep_table(scores: Mapping[float, Scores]) -> rich.table.Table:
  """A row for each metric, a column for each alpha; the best value is bold."""
  shown = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  shown.add_column("alpha")
  for alpha in scores:
    shown.add_column(f"{alpha:g}", justify="right")
  for metric in next(iter(scores.values())):
    values = [one[metric] for one in scores.values()]
    shown.add_row(metric, *(f"{x:.4f}" if isinstance(x, float) else f"{x:,}" for x in values))
  return shown


def main(argv: Sequence[str] | None = None) -> None:
  """The program."""
  parser = parsers.merge()
  args = parser.parse_args(argv)
  _check(parser, args)
  runtime.setup()
  evals = data_evals(args.retrieval, args.fields and args.fields.split(","), args.zeroshot)
  which = {"step": args.step, "ema": args.ema}
  with progress.shown():
    if args.alphas:
      one, other = args.models
      scores = sweep(one, other, parse_alphas(args.alphas), evals=evals, **which)
      tables.show(_sweep_table(scores))
      figures: Any = {"models": args.models, **which, "alphas": [*scores]}
      figures["metrics"] = [*scores.values()]
    elif args.greedy:
      rows = greedy_soup(
        args.models, args.out, metric=args.metric, mode=args.mode, evals=evals, **which
      )
      shown = rich.table.Table("model", "alone", "mean", "taken", box=rich.box.SIMPLE_HEAD)
      for row in rows:
        words = (row["model"], f"{row['alone']:.4f}", f"{row['mean']:.4f}")
        shown.add_row(*words, "yes" if row["taken"] else "no")
      tables.show(shown)
      figures = {"out": args.out, **which, "metric": args.metric, "members": rows}
    else:
      if args.soup:
        soup(args.models, args.out, **which)
      else:
        one, other = args.models
        merge(one, other, args.alpha, args.out, **which)
      figures = {"out": args.out, "models": args.models, **which}
  if args.out:
    print(f"{args.out}: written, as the folder of a run")
  if args.json:
    tables.write_json(args.json, figures)
    print(f"written to {args.json}")


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
  """Ends the program for flags that do not go together."""
  if args.greedy and not args.soup:
    parser.error("--greedy needs --soup")
  if not args.soup and len(args.models) != 2:
    parser.error(f"{len(args.models)} models: --alpha and --alphas take two; --soup takes several")
  if args.soup and args.alphas:
    parser.error("--alphas and --soup: choose one")
  if args.alphas and args.out:
    parser.error("--alphas evaluates; choose one alpha, then merge with --alpha and --out")
  if not args.alphas and not args.out:
    parser.error("--out DIR is missing, or --alphas")
  if not 0 <= args.alpha <= 1:
    raise errors.UsageError(f"--alpha={args.alpha} is not from 0 to 1")


def run() -> None:
  """The program `bigalign merge`."""
  try:
    main()
  except Exception as error:
    preemption.exit_on_error(error)


if __name__ == "__main__":
  run()
