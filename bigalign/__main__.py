"""The command `bigalign PROGRAM ...`: runs a program, which parses the other arguments."""

from __future__ import annotations

import importlib
import sys

PROGRAMS = {
  "train": "train a model from a config file",
  "evaluate": "run evaluators on a checkpoint of a run",
  "embed": "run a dataset through frozen towers and store the embeddings",
  "compare": "measure which frozen towers agree, without training",
  "curate": "pick a class-balanced subset from embedding stores",
  "report": "write an HTML report of a run",
  "export": "write a run as a folder that transformers, open_clip or big_vision load",
  "inspect": "summarise a dataset: contact sheet, bad samples, reading speed",
  "index": "index the samples of shards for random access in training",
  "convert": "copy a source to ArrayRecord files, optionally with smaller images",
  "view": "select the samples of a source by rules, deduplication or lists",
  "plan": "predict memory, speed and cost of a config on a TPU slice you don't have yet",
  "costs": "compute the cost of losses per device: memory, FLOPs, communication",
}
_MODULES = {
  "train": "train",
  "evaluate": "evaluate",
  "embed": "frozen.embed",
  "compare": "frozen.compare",
  "curate": "frozen.curate",
  "report": "report.main",
  "export": "export.main",
  "inspect": "shards.inspect",
  "index": "shards.index",
  "convert": "shards.convert",
  "view": "shards.view",
  "plan": "plan.main",
  "costs": "plan.loss_costs",
}


def main() -> None:
  """Runs the program that the command line names."""
  name = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if name in ("-h", "--help"):
    print("usage: bigalign PROGRAM …\n")
    print("\n".join(f"  {program:<10}{summary}" for program, summary in PROGRAMS.items()))
    print("\nRun `bigalign PROGRAM --help` for its options.")
    return
  if name not in PROGRAMS:
    sys.exit(f"bigalign: unknown program {name!r}; known: {', '.join(PROGRAMS)}")
  module = importlib.import_module(f"bigalign.{_MODULES[name]}")
  sys.argv = [f"bigalign {name}", *sys.argv[2:]]
  module.run()


if __name__ == "__main__":
  main()
