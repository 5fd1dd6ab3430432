"""Evaluates a model, or several on a suite of tasks: bigalign evaluate runs/siglip."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

import jax
from absl import logging

from bigalign.api.loading import load, open_any
from bigalign.api.model import Model
from bigalign.evaluate import data_evals, evaluate, evaluators_with_data, measure, table
from bigalign.run import parsers, preemption, progress, runtime
from bigalign.run.tables import show, write_json, write_text
from bigalign.suites import results, runner
from bigalign.suites.suite import read_suite
from bigalign.weights.runs import is_run


def main(argv: Sequence[str] | None = None) -> dict[str, float] | list[runner.Result]:
  """The program; returns the metrics or results that it prints and writes."""
  parser = parsers.evaluate()
  args = parser.parse_args(argv)
  runtime.setup()
  runtime.connect()
  return _suite(parser, args) if args.suite else _one(parser, args)


def _one(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, float]:
  """Evaluates one model by the evaluators of its config, or by data that is given."""
  if len(args.model) > 1 or args.csv or args.html or args.ema:
    parser.error("several models, --csv, --html and --ema need --suite")
  (address,) = args.model
  opened = open_any(address, args.step)
  stores = {name: getattr(args, name) for name in ("image_store", "text_store", "class_store")}
  fields = args.fields and args.fields.split(",")
  evals = data_evals(args.retrieval, fields, args.zeroshot, **stores)
  if not evals and not opened.config.evals:
    parser.error(
      f"{address} has no config.evals; give --retrieval SHARDS, --zeroshot DIR or --suite SUITE"
    )
  logging.info("Step %d of %s on %s", opened.step, opened.address, runtime.describe())
  left_out: dict[str, str] = {}
  with progress.shown(jax.process_index() == 0):
    if evals:
      metrics = evaluate(opened, evals)
    else:
      evaluators, left_out = evaluators_with_data(opened)
      metrics = measure(opened, evaluators)
      evals = {name: opened.meta["config"]["evals"][name] for name in evaluators}
  if jax.process_index() == 0:
    show(table(metrics))
    if args.json:
      written = {
        "run": opened.address,
        "step": opened.step,
        "samples_seen": opened.meta["samples_seen"],
        "revision": opened.meta["revision"],
        "evals": evals,
        "left_out": left_out,  # {evaluator of the config: why its data could not be read}
        "metrics": metrics,
      }
      write_json(args.json, written)
      print(f"written to {args.json}")
  return metrics


def _suite(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[runner.Result]:
  """Evaluates models on the tasks of a suite."""
  for name in ("retrieval", "fields", "zeroshot", "image_store", "text_store", "class_store"):
    if getattr(args, name):
      parser.error(f"--{name} has no effect with --suite; write a task into a file of tasks")
  if (args.ema or args.step != "latest") and not any(map(is_run, args.model)):
    parser.error("--ema and --step have no effect: no model is a run")
  tasks = read_suite(args.suite)
  subjects = [runner.Subject(name, _loaded(name, args)) for name in dict.fromkeys(args.model)]
  with progress.shown(jax.process_index() == 0):
    found = [*runner.evaluate(subjects, tasks, args.cache)]
  if jax.process_index() == 0:
    show(results.table(found))
    for line in results.left_out(found):
      print(line)
    if args.json:
      write_json(args.json, results.clip_benchmark(found))
    if args.csv:
      write_text(args.csv, results.as_csv(found))
    if args.html:
      write_text(args.html, results.page(found, f"Suite {pathlib.Path(args.suite).stem}"))
    for path in filter(None, (args.json, args.csv, args.html)):
      print(f"written to {path}")
  return found


def _loaded(address: str, args: argparse.Namespace) -> Model:
  """A model of a suite; --step and --ema are of runs."""
  return load(address, args.step, args.ema) if is_run(address) else load(address)


def run() -> None:
  """The program `bigalign evaluate`."""
  try:
    main()
  except Exception as error:
    preemption.exit_on_error(error)


if __name__ == "__main__":
  run()
