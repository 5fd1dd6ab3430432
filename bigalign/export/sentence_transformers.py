"""The format sentence-transformers: the text side as a folder of that library."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from bigalign import tree, weights
from bigalign.export import hugging_face
from bigalign.export.base import (
  Arrays,
  Contents,
  Format,
  Reasons,
  TrainedModel,
  projector_name,
  requirement,
  tower_name,
)
from bigalign.export.fit import differences
from bigalign.towers.bert import BertOptions
from bigalign.weights import transfer
from bigalign.weights.layout import Layout

NAME = "sentence-transformers"
_POOLS = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
# {projector: its (layer, class of torch for the activation after it)}
_DENSE = {
  "identity": (),
  "linear": (("out", "torch.nn.modules.linear.Identity"),),
  "mlp": (
    ("fc1", "torch.nn.modules.activation.GELU"),
    ("fc2", "torch.nn.modules.linear.Identity"),
  ),
}


def _prepare(trained: TrainedModel) -> Contents | Reasons:
  """The contents of the folder, or why the format cannot hold the text side."""
  options = trained.text
  if not isinstance(options, BertOptions):
    return {NAME: [requirement("config.model.text.name", tower_name(options), "bert")]}
  try:
    bert_config = hugging_face.bert(trained)
    layout = weights.LAYOUTS[bert_config["model_type"]]({}, NAME, "", **bert_config)
  except ValueError as error:  # the reader of their config refuses it
    return {NAME: [str(error)]}
  wrong = _reasons(trained, layout)
  if wrong:
    return {NAME: wrong}
  files: dict[str, Any] = {
    "config.json": bert_config | dict(dtype="float32"),
    "sentence_bert_config.json": dict(max_seq_length=trained.tokenizer.length, do_lower_case=False),
  }
  tensors: dict[str, Callable[[], Arrays]] = {
    "model.safetensors": functools.partial(_encoder, layout, trained)
  }
  kinds = [("Transformer", "")]
  for number, (kind, about, arrays) in enumerate(_modules(trained), 1):
    path = f"{number}_{kind}"
    kinds.append((kind, path))
    files[f"{path}/config.json"] = about
    if arrays:
      tensors[f"{path}/model.safetensors"] = functools.partial(dict, arrays)
  files["modules.json"] = [
    dict(idx=i, name=str(i), path=path, type=f"sentence_transformers.models.{kind}")
    for i, (kind, path) in enumerate(kinds)
  ]
  try:
    return Contents(NAME, tensors, files | trained.tokenizer_files())
  except ValueError as error:
    return {NAME: [str(error)]}


def _reasons(trained: TrainedModel, layout: Layout) -> list[str]:
  """Why the format cannot hold the text side; empty if it can."""
  options = trained.text
  values = {k: v for k, v in layout.model["text"].items() if k != "name"}
  # The modules after the encoder pool and normalise.
  theirs = BertOptions(**{**values, "pool": options.pool, "unit": options.unit}).build()
  wrong = [
    requirement(f"config.model.text.{name}", a, b)
    for name, (a, b) in differences(trained.model.text_tower, theirs, trained).items()
  ]
  if options.pool not in _POOLS:
    wrong.append(requirement("config.model.text.pool", options.pool, *_POOLS))
  projector = projector_name(trained.model.text_projector)
  if projector not in _DENSE:
    wrong.append(requirement("config.model.text_projector.name", projector, *_DENSE))
  return wrong


def _encoder(layout: Layout, trained: TrainedModel) -> Arrays:
  """The encoder's tensors, with zeros for the pooler, which their classes have but do not use."""
  width = trained.text.sizes.width
  pooler = {"pooler.dense.weight": (width, width), "pooler.dense.bias": (width,)}
  zeros = {key: np.zeros(shape, np.float32) for key, shape in pooler.items()}
  return dict(transfer.write(layout, trained.arrays)) | zeros


def _modules(trained: TrainedModel) -> Iterator[tuple[str, dict[str, Any], Arrays]]:
  """Yields (kind, config, tensors) of the modules after the encoder."""
  options = trained.text
  pooling = {name: pool == options.pool for pool, name in _POOLS.items()}
  yield "Pooling", dict(word_embedding_dimension=options.sizes.width, **pooling), {}
  layers = _DENSE[projector_name(trained.model.text_projector)]
  if options.unit and layers:
    yield "Normalize", {}, {}
  for name, function in layers:
    ours = tree.subtree(trained.arrays, f"text_projector/{name}/")
    features_in, features_out = ours["kernel"].shape
    tensors = {"linear.weight": ours["kernel"].T}
    if "bias" in ours:
      tensors["linear.bias"] = ours["bias"]
    config = dict(
      in_features=features_in,
      out_features=features_out,
      bias="bias" in ours,
      activation_function=function,
    )
    yield "Dense", config, tensors
  yield "Normalize", {}, {}


def _compute(
  folder: pathlib.Path, images: Sequence[Image.Image], texts: Sequence[str]
) -> np.ndarray:
  """The embeddings of the texts."""
  import sentence_transformers

  model = sentence_transformers.SentenceTransformer(
    str(folder), device="cpu", local_files_only=True
  )
  return np.asarray(model.encode(list(texts)))


_USAGE = """```python
from sentence_transformers import SentenceTransformer

embeddings = SentenceTransformer("DIR").encode(["a cat", "a dog"])  # unit norm
```

This is the text side alone. Compare its embeddings with the run's own embeddings of images.
"""

FORMAT = Format(
  name=NAME,
  prepare=_prepare,
  compute=_compute,
  packages=("torch", "sentence_transformers"),
  heads=False,
  output="embeddings",
  library="sentence-transformers",
  tags=("feature-extraction", "safetensors"),
  usage=lambda trained: _USAGE,
)
