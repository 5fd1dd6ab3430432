"""The model card of an exported folder."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from bigalign.config import recorded_config
from bigalign.data.loader.options import DataOptions
from bigalign.evals.chance import chance
from bigalign.evals.retrieval import RECALL_AT
from bigalign.evaluate import Run
from bigalign.export import published
from bigalign.export.base import Contents, Format, TrainedModel, tower_name
from bigalign.losses.logit_head import of_losses
from bigalign.run.metrics import read_metrics
from bigalign.stages import split
from bigalign.towers.base import TransformerOptions


def facts(
  run: Run,
  kind: str,
  family: str,
  ema: bool,
  *,
  name: str = "",
  license: str | None = None,
  datasets: Sequence[str] = (),
) -> dict[str, Any]:
  """The content of bigalign.json: the format, and data about the run.

  Args:
    run: the run.
    kind: the name of the format.
    family: of the model in the folder.
    ema: whether the averaged parameters are exported.
    name: of the model; "": that of the run's folder.
    license: of the weights, by its identifier on the hub; None: not stated.
    datasets: identifiers of the training data on the hub.
  """
  rows = [row for row in read_metrics(run.workdir) if row["step"] == run.step]
  measured = {k: x for row in rows for k, x in row.items() if k.startswith(("val/", "ema/"))}
  return {
    "name": name or run.name,
    "format": kind,
    "family": family,
    "step": run.step,
    "ema": ema,
    "license": license,
    "datasets": [*datasets],
    **{k: run.meta[k] for k in ("samples_seen", "dataset_size", "data", "revision", "versions")},
    "metrics": measured,
    "head": of_losses(run.ema if ema else run.params, run.config.loss)._asdict(),
    "config": published.without_users(run.meta["config"]),
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
  about: Mapping[str, Any],
  kind: Format,
  contents: Contents,
  trained: TrainedModel,
  difference: float | None,
) -> str:
  """README.md in the form of the Hugging Face hub.

  Args:
    about: the content of bigalign.json.
    kind: the format.
    contents: of the folder.
    trained: the model.
    difference: of the outputs from the run's, relative to the largest; None if not compared.
  """
  measured = {
    k.removeprefix("ema/"): x
    for k, x in about["metrics"].items()
    if k.startswith("ema/") == about["ema"]
  }
  has_pipeline = _has_pipeline(kind, contents, trained)
  front = _front_matter(about, kind, measured, has_pipeline)
  pipeline = (
    "The pipeline `zero-shot-image-classification` of transformers does not work: it pads the"
    f" texts of every SigLIP to {_PIPELINE_LENGTH} tokens, and this model needs"
    f" {trained.data.text_length}.\n"
  )
  exif = _EXIF if trained.data.apply_exif else ""
  parts = [
    *_opening(about, kind, trained, front, _summary(about, kind, trained)),
    *([] if has_pipeline else [pipeline.rstrip()]),
    *([_IMAGES.replace("{exif}", exif).rstrip()] if kind.output == "logits" else []),
    "## Metrics",
    _metrics(measured),
    "## Training",
    _training(about, kind, contents, trained, difference),
    "<details><summary>All options of the run</summary>",
    f"```json\n{json.dumps(about['config'], indent=1)}\n```",
    "</details>",
  ]
  return "\n\n".join(parts) + "\n"


def converted(
  about: Mapping[str, Any],
  kind: Format,
  contents: Contents,
  trained: TrainedModel,
  difference: float | None,
) -> str:
  """README.md of a model that bigalign did not train; the arguments are those of `text`."""
  has_pipeline = _has_pipeline(kind, contents, trained)
  front = _front_matter(about, kind, {}, has_pipeline)
  compared = (
    "Outputs were not compared with the original's."
    if difference is None
    else f"Outputs match the original's (maximum relative difference {difference:.1e})."
  )
  summary = f"Converted by bigalign from {about['converted_from']} to {contents.family}. {compared}"
  return "\n\n".join(_opening(about, kind, trained, front, summary)) + "\n"


def _opening(
  about: Mapping[str, Any],
  kind: Format,
  trained: TrainedModel,
  front: Mapping[str, Any],
  summary: str,
) -> list[str]:
  """The parts of every model card: front matter, title, summary and usage."""
  return [
    f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
    f"# {about['name']}",
    summary,
    "## Usage",
    kind.usage(trained).replace("{padding}", _padding(trained)).rstrip(),
    '"DIR" is this folder.',
  ]


def for_hub(card: str, kind: Format, repo: str) -> str:
  """A model card whose code loads the repository "user/name" of the hub.

  Args:
    card: README.md of an exported folder.
    kind: its format.
    repo: the repository.
  """
  old, new = kind.on_hub
  return card.replace(old, new.replace("REPO", repo)).replace('\n\n"DIR" is this folder.', "")


# {output of a format: (task of the hub, what the folder holds)}
_TASKS = {
  "logits": ("zero-shot-image-classification", "An image-text dual encoder"),
  "embeddings": ("sentence-similarity", "The text side of an image-text dual encoder"),
}


def _front_matter(
  about: Mapping[str, Any], kind: Format, measured: Mapping[str, float], has_pipeline: bool
) -> dict[str, Any]:
  """The metadata of the hub; see https://huggingface.co/docs/hub/model-cards."""
  front: dict[str, Any] = {"license": about["license"]} if about["license"] else {}
  front["library_name"] = kind.library
  if has_pipeline:
    front["pipeline_tag"] = _TASKS[kind.output][0]
  losses = list(about["config"]["loss"])
  front["tags"] = list(dict.fromkeys(["bigalign", "image-text", *losses, *kind.tags]))
  if about["datasets"]:
    front["datasets"] = about["datasets"]
  results = _results(measured) if kind.output == "logits" else []
  if results:
    types = [metric["type"] for result in results for metric in result["metrics"]]
    front["metrics"] = list(dict.fromkeys(types))
    front["model-index"] = [{"name": about["name"], "results": results}]
  return front


# Metrics of evaluators that the hub can show: (pattern with the evaluator's name, task, {end of the
# metric: (type on the hub, name)}).
_SHOWN = (
  (
    re.compile(r"val/(?P<name>.+)-zeroshot-val-(?P<metric>\w+)"),
    ("zero-shot-image-classification", "Zero-shot image classification"),
    {
      "top1": ("accuracy", "Top-1 accuracy"),
      "top5": ("accuracy", "Top-5 accuracy"),
      "mean_per_class_recall": ("recall", "Mean recall of the classes"),
      "mean_average_precision": ("mean_average_precision", "Mean average precision"),
    },
  ),
  (
    re.compile(r"val/(?:(?P<name>.+)/)?(?P<metric>(?:image_to_text|text_to_image)_R@\d+)"),
    ("image-text-retrieval", "Image-text retrieval"),
    {
      f"{direction}_R@{k}": ("recall", f"{direction.replace('_', ' ').capitalize()}, recall@{k}")
      for direction in ("image_to_text", "text_to_image")
      for k in RECALL_AT
    },
  ),
)


def _results(measured: Mapping[str, float]) -> list[dict[str, Any]]:
  """The `results` of the hub's model-index: one per evaluator.

  The type of a dataset would be its identifier on the hub. A run does not know it, so it is
  "unknown", as in the cards of sentence-transformers.
  """
  results: dict[tuple[str, str], dict[str, Any]] = {}
  for key, value in measured.items():
    for pattern, (task, title), known in _SHOWN:
      match = pattern.fullmatch(key)
      if match is None or match["metric"] not in known or not math.isfinite(value):
        continue
      kind, label = known[match["metric"]]
      name = match["name"] or "val"
      result = results.setdefault(
        (task, name),
        {
          "task": {"type": task, "name": title},
          "dataset": {"type": "unknown", "name": name},
          "metrics": [],
        },
      )
      result["metrics"].append({"type": kind, "value": value, "name": label})
  return list(results.values())


def _summary(about: Mapping[str, Any], kind: Format, trained: TrainedModel) -> str:
  """One paragraph: what the folder holds."""
  towers = {"images": trained.image, "texts": trained.text}
  described = []
  for inputs, options in towers.items():
    name = f"`{tower_name(options)}`"
    if isinstance(options, TransformerOptions):
      depth = options.sizes.depth
      name += f" ({depth} layer{'s' * (depth != 1)} of width {options.sizes.width})"
    described.append(f"{name} for {inputs}")
  width = about["config"]["model"]["embed_dim"]
  return (
    f"{_TASKS[kind.output][1]}: {' and '.join(described)}, with embeddings of width {width}."
    f" Trained with bigalign, and exported for {kind.library}."
  )


def _metrics(measured: Mapping[str, float]) -> str:
  """The metrics of the exported step, next to their chance levels."""
  if not measured:
    return "None at this step."
  by_chance = chance(measured)
  rows = ["| metric | value | chance |", "|---|---|---|"]
  for name, value in measured.items():
    rows.append(
      f"| {name} | {value:.4g} | {f'{by_chance[name]:.4g}' if name in by_chance else ''} |"
    )
  return "\n".join(rows)


def _images(data: DataOptions) -> str:
  """How images were given to the model."""
  if data.naflex:
    return f"{data.naflex.length} patches of {data.naflex.patch} pixels, in their own aspect"
  return f"{data.image_size} pixels, {data.resize}"


def _training(
  about: Mapping[str, Any],
  kind: Format,
  contents: Contents,
  trained: TrainedModel,
  difference: float | None,
) -> str:
  """How the model was trained, as a table."""
  config = recorded_config(about)
  data = config.data
  stages = split(config, dataset_size=about["dataset_size"])
  sizes = [size for size, _ in itertools.groupby(stage.batch_size for stage in stages)]
  rows = [
    ("trained by", f"bigalign {about['revision']}"),
    ("model", contents.family + (", averaged parameters" if about["ema"] else "")),
    ("data", f"{_sources(data)} ({about['dataset_size']:,} samples, {about['data']})"),
    ("loss", ", ".join(config.loss)),
    ("steps", f"{about['step']:,} of batch {', then '.join(f'{size:,}' for size in sizes)}"),
    ("samples seen", f"{about['samples_seen']:,}"),
    ("images", _images(data)),
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
  return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
