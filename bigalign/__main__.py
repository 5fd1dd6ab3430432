"""bigalign <program>: the first word chooses the program, which reads the rest."""

from __future__ import annotations

import importlib
import sys

PROGRAMS = {
  "train": "trains a model from a config file",
  "evaluate": "runs the evaluators on a run's checkpoint",
  "embed": "a dataset through frozen towers, into embedding stores",
  "compare": "which frozen towers agree, before anything is trained",
  "curate": "samples that concepts choose, the rarest first, from embedding stores",
  "report": "makes one HTML page of a run",
  "export": "writes a run as a folder that PyTorch's libraries load",
  "inspect": "tells what is in shards, with a contact sheet, and how fast they are read",
  "index": "makes shards ready for training: where each of their samples lies",
  "convert": "copies a source into ArrayRecord files, images made smaller if wanted",
  "view": "keeps the samples of a source that a rule or a list leaves",
  "plan": "whether a config fits a pod, how fast at best and at what price, before there is one",
  "costs": "what losses cost per device: memory, products, bytes on the wires",
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
  """The console command."""
  name = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if name in ("-h", "--help"):
    print("usage: bigalign PROGRAM …\n")
    print("\n".join(f"  {program:<10}{what}" for program, what in PROGRAMS.items()))
    print("\nbigalign PROGRAM --help tells the options.")
    return
  if name not in PROGRAMS:
    sys.exit(f"bigalign: unknown program {name!r}; known: {', '.join(PROGRAMS)}")
  module = importlib.import_module(f"bigalign.{_MODULES[name]}")
  sys.argv = [f"bigalign {name}", *sys.argv[2:]]
  module.run()


if __name__ == "__main__":
  main()
