"""The command `bigalign PROGRAM ...`: runs a program, which parses the other arguments."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from importlib import metadata

from bigalign import tree
from bigalign.run import errors

# {program: (its module below bigalign, summary)}; the module has a function `run`.
PROGRAMS = {
  "train": ("train", "train a model from a config file"),
  "evaluate": ("suites.main", "evaluate a model, or several on a suite of tasks"),
  "embed": ("frozen.embed", "run a dataset through frozen towers and store the embeddings"),
  "reinforce": ("frozen.reinforce", "store a teacher's vectors of augmented views and captions"),
  "compare": ("frozen.compare", "measure which frozen towers agree, without training"),
  "curate": ("frozen.curate", "pick a class-balanced subset from embedding stores"),
  "dedup": ("frozen.dedup", "find near-duplicates in an embedding store"),
  "report": ("report.main", "write an HTML report of a run"),
  "export": (
    "export.main",
    "write a run as a folder that transformers, open_clip or big_vision load",
  ),
  "merge": ("merge.main", "average the weights of models: interpolation and soups"),
  "inspect": ("shards.inspect", "summarise a dataset: contact sheet, bad samples, reading speed"),
  "index": ("shards.index", "index the samples of shards for random access in training"),
  "convert": ("shards.convert", "copy a source to ArrayRecord files, optionally shrinking images"),
  "view": ("shards.view", "select the samples of a source by rules, deduplication or lists"),
  "score": ("shards.score", "score how well images and captions fit, by a trained model"),
  "noise": ("shards.noise", "find how likely each caption is wrong, from the losses of all"),
  "balance": ("shards.balance", "balance the concepts of captions: a probability for each sample"),
  "search": ("search.main", "find images by text or image: terminal, JSON or local web page"),
  "plan": (
    "plan.main",
    "predict memory, speed and cost of a config on a TPU slice you don't have yet",
  ),
  "benchmark": (
    "benchmark.main",
    "measure this machine: step, loader, embedding and evaluation, next to the plan",
  ),
  "costs": (
    "plan.loss_costs",
    "compute the cost of losses per device: memory, FLOPs, communication",
  ),
  "configs": ("cli.configs", "list the shipped configs, print or copy one"),
  "options": ("cli.reference", "explain the options of a config: bigalign options data.augment"),
}


def main() -> None:
  """Runs the program that the command line names."""
  name = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if name in ("-h", "--help"):
    print("usage: bigalign PROGRAM …\n")
    print("\n".join(f"  {program:<10}{summary}" for program, (_, summary) in PROGRAMS.items()))
    print("\nRun `bigalign PROGRAM --help` for its options, `bigalign --version` for the version.")
    return
  if name == "--version":
    print(f"bigalign {metadata.version('bigalign')}")
    return
  if name not in PROGRAMS:
    near = tree.nearest(name, PROGRAMS)
    print(
      f"bigalign: unknown program {name!r}.{near} Known: {', '.join(PROGRAMS)}", file=sys.stderr
    )
    sys.exit(2)
  words = errors.take_flag(sys.argv[2:])
  sys.argv = [f"bigalign {name}", *words]
  with errors.reported(sys.argv[0]):
    if "--help" in words or "-h" in words:
      _help(name)
    else:
      _run(name)


def _run(name: str) -> None:
  from bigalign.run.parsers import PARSERS

  if name in PARSERS:  # --help and a wrong command line end here, before JAX is imported
    PARSERS[name]().parse_args()
  # The threads of numpy's OpenBLAS, one per core, wait for work without sleeping, after the import
  # and after each product: 0.1 s by default; 2^20 cycles are less than 1 ms. Workers inherit it.
  os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")
  gc.disable()
  program = importlib.import_module(f"bigalign.{PROGRAMS[name][0]}")
  gc.freeze()  # modules last as long as the program: no collection needs to look through them
  gc.enable()
  program.run()


def _help(name: str) -> None:
  """Prints the help of a program, without importing JAX."""
  from bigalign.cli import examples, help
  from bigalign.run.flags import PROGRAMS as WITH_CONFIG

  if name in WITH_CONFIG:
    print(help.text(name))
    return
  try:
    _run(name)  # argparse prints the help and exits
  finally:
    print(f"\n{examples.text(name)}")


if __name__ == "__main__":
  main()
