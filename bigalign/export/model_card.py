"""The model card of an exported folder."""

from __future__ import annotations

import itertools
import json
from typing import Any

from bigalign.config import recorded_config
from bigalign.data.loader.options import DataOptions
from bigalign.evaluate import Run
from bigalign.export.base import Contents, Format, TrainedModel
from bigalign.run.metrics import read_metrics
from bigalign.stages import split


def facts(run: Run, name: str, family: str, ema: bool) -> dict[str, Any]:
  """The content of bigalign.json: the format, and data about the run.

  Args:
    run: the run.
    name: of the format.
    family: of the model in the folder.
    ema: whether the averaged parameters are exported.
  """
  rows = [row for row in read_metrics(run.workdir) if row["step"] == run.step]
  measured = {k: x for row in rows for k, x in row.items() if k.startswith(("val/", "ema/"))}
  return {
    "format": name,
    "family": family,
    "step": run.step,
    "ema": ema,
    **{k: run.meta[k] for k in ("samples_seen", "dataset_size", "data", "revision", "versions")},
    "metrics": measured,
    "config": run.meta["config"],
  }


def _sources(data: DataOptions) -> str:
  """The sources of the data, quoted."""
  return ", ".join(f"`{name}`" for name in data.sources)


def _padding(trained: TrainedModel) -> str:
  """How texts must be padded."""
  if trained.vector_shape:
    return ""
  if trained.padding_has_no_effect:
    return "any padding works: the last token is pooled, and it does not see the padding after it."
  seen = (
    "The attention mask hides padding."
    if trained.hides_padding
    else "Attention sees padding; a mask would change the embeddings."
  )
  return f"the model was trained on texts padded to {trained.data.text_length} tokens. {seen}"


_PIPELINE_LENGTH = 64  # to which transformers' pipeline pads the texts of every SigLIP

_IMAGES = """## Images

The run blends transparent pixels with white and scales 16 bits to 8. Pillow, with which these
libraries read images, does neither: `convert("RGB")` shows the pixels under the transparency, and
cuts 16 bits off at 255.{exif} Convert such images before:

```python
import numpy as np
from PIL import Image

def as_trained(image):
  if image.mode.startswith("I"):  # 16 bits
    scaled = (np.asarray(image).astype("uint32") + 128) // 257
    return Image.fromarray(scaled.astype("uint8")).convert("RGB")
  image = image.convert("RGBA")
  return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
```
"""
_EXIF = " It also turns images as their EXIF data says (`ImageOps.exif_transpose`)."


def _has_pipeline(kind: Format, contents: Contents, trained: TrainedModel) -> bool:
  """Whether transformers' pipeline gives the model's logits; it has one length for all SigLIPs."""
  siglip = kind.library == "transformers" and contents.family == "SiglipModel"
  return not siglip or trained.data.text_length == _PIPELINE_LENGTH


def text(
  about: dict[str, Any],
  kind: Format,
  contents: Contents,
  trained: TrainedModel,
  license: str,
  difference: float | None,
) -> str:
  """README.md in the form of the Hugging Face hub.

  Args:
    about: the content of bigalign.json.
    kind: the format.
    contents: of the folder.
    trained: the model.
    license: of the weights.
    difference: of the outputs from the run's, relative to the largest; None if not compared.
  """
  config, prefix = recorded_config(about), "ema/" if about["ema"] else ""
  data = config.data
  task, title = {
    "logits": ("zero-shot-image-classification", "An image-text dual encoder"),
    "embeddings": ("sentence-similarity", "The text side of an image-text dual encoder"),
  }[kind.output]
  exif = _EXIF if data.apply_exif else ""
  has_pipeline = _has_pipeline(kind, contents, trained)
  head = [f"license: {license}", *([f"pipeline_tag: {task}"] if has_pipeline else [])]
  head += [f"library_name: {kind.library}"] if kind.library else []
  measured = {
    k.removeprefix("ema/"): x
    for k, x in about["metrics"].items()
    if k.startswith("ema/") == about["ema"]
  }
  stages = split(config, dataset_size=about["dataset_size"])
  sizes = [size for size, _ in itertools.groupby(stage.batch_size for stage in stages)]
  rows = [
    ("trained by", f"bigalign {about['revision']}"),
    ("model", contents.family + (", averaged parameters" if prefix else "")),
    ("data", f"{_sources(data)} ({about['dataset_size']:,} samples, {about['data']})"),
    ("loss", ", ".join(config.loss)),
    ("steps", f"{about['step']:,} of batch {', then '.join(f'{size:,}' for size in sizes)}"),
    ("samples seen", f"{about['samples_seen']:,}"),
    ("images", f"{data.image_size} pixels, {data.resize}"),
    (
      "texts",
      f"vectors from another program, {trained.vector_shape[-1]} wide"
      if trained.vector_shape
      else f"{data.tokenizer.name}, {data.text_length} tokens",
    ),
    (
      kind.output,
      "not compared with the run's"
      if difference is None
      else f"match the run's (maximum relative difference {difference:.1e})",
    ),
  ]
  parts = [
    "---",
    *head,
    "---",
    "",
    f"# {title}",
    "",
    "| | |",
    "|---|---|",
    *(f"| {name} | {value} |" for name, value in rows),
    "",
    kind.usage.replace("DIR", "this folder").replace("{padding}", _padding(trained)),
    *(
      []
      if has_pipeline
      else [
        "The pipeline `zero-shot-image-classification` of transformers does not work: it pads the"
        f" texts of every SigLIP to {_PIPELINE_LENGTH} tokens, and this model needs"
        f" {trained.data.text_length}.",
        "",
      ]
    ),
    *([_IMAGES.replace("{exif}", exif)] if kind.output == "logits" else []),
    "## Metrics",
    "",
    *(
      ["| metric | value |", "|---|---|", *(f"| {k} | {x:.4g} |" for k, x in measured.items())]
      if measured
      else ["None at this step."]
    ),
    "",
    "## Config",
    "",
    "<details><summary>All options of the run</summary>",
    "",
    "```json",
    json.dumps(about["config"], indent=1),
    "```",
    "",
    "</details>",
    "",
  ]
  return "\n".join(parts)
