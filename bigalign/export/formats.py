"""The registry of formats that `bigalign export` writes."""

from __future__ import annotations

from bigalign.export import big_vision, hugging_face, open_clip, sentence_transformers, torch_module
from bigalign.export.base import Contents, TrainedModel

FORMATS = {
  module.FORMAT.name: module.FORMAT
  for module in (hugging_face, open_clip, big_vision, torch_module, sentence_transformers)
}


def prepare(name: str, trained: TrainedModel) -> Contents:
  """The contents of a folder in a format.

  Raises:
    ValueError: if the format cannot hold the model; it lists the reasons of each family, the keys
      of the config, and the formats that can.
  """
  contents = FORMATS[name].prepare(trained)
  if isinstance(contents, Contents):
    return contents
  others = [
    x.name if x.output == "logits" else f"{x.name} (the text side)"
    for x in FORMATS.values()
    if x.name != name and isinstance(x.prepare(trained), Contents)
  ]
  reasons = "\n".join(f"  {family}: {'; '.join(why)}" for family, why in contents.items())
  raise ValueError(
    f"--format={name} cannot hold this model.\n{reasons}\n"
    + (f"Formats that can: {', '.join(others)}" if others else "No other format can.")
  )
