"""The text side of a model of ours as a sentence-transformers folder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bigalign import tree, weights
from bigalign.export import hugging_face
from bigalign.export.fit import Arrays, Subject, differences
from bigalign.towers.bert import Bert, BertOptions
from bigalign.weights import transfer
from bigalign.weights.layout import Layout

NAME = "sentence-transformers"
_POOLS = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
# By the projector's class: its layers, and what torch calls the function behind each.
_DENSE = {
  "Identity": (),
  "Linear": (("out", "torch.nn.modules.linear.Identity"),),
  "Mlp": (
    ("fc1", "torch.nn.modules.activation.GELU"),
    ("fc2", "torch.nn.modules.linear.Identity"),
  ),
}


def folder(it: Subject) -> tuple[dict[str, Any], dict[str, Callable[[], Arrays]]] | list[str]:
  """({file: JSON}, {file: what makes its tensors}), or why it cannot be such a folder."""
  tower = it.model.text_tower
  if type(tower) is not Bert:
    return [f"config.model.text.name: no {type(tower).__name__} in it"]
  try:
    bert_config = hugging_face.bert(it)
    layout = weights.LAYOUTS[bert_config["model_type"]]({}, NAME, "", **bert_config)
  except ValueError as error:  # what the reader of their config would say
    return [str(error)]
  options = {k: v for k, v in layout.model["text"].items() if k != "name"}
  ours = tower.options
  theirs = BertOptions(**{**options, "pool": ours.pool, "unit": ours.unit}).build()
  wrong = [
    f"config.model.text.{name}={a!r}, there {b!r}"
    for name, (a, b) in differences(tower, theirs, it).items()
  ]
  if ours.pool not in _POOLS:
    wrong.append(f"config.model.text.pool={ours.pool!r}, there {' or '.join(map(repr, _POOLS))}")
  projector = type(it.model.text_projector).__name__
  if projector not in _DENSE:
    wrong.append(f"config.model.text_projector.name: no {projector} in it, only what Dense holds")
  if wrong:
    return wrong
  files: dict[str, Any] = {
    "config.json": bert_config | dict(dtype="float32"),
    "sentence_bert_config.json": dict(max_seq_length=it.tokenizer.length, do_lower_case=False),
  }
  tensors: dict[str, Callable[[], Arrays]] = {
    "model.safetensors": functools.partial(_encoder, layout, it)
  }
  kinds = [("Transformer", "")]
  for place, (kind, about, found) in enumerate(_modules(it), 1):
    path = f"{place}_{kind}"
    kinds.append((kind, path))
    files[f"{path}/config.json"] = about
    if found:
      tensors[f"{path}/model.safetensors"] = functools.partial(dict, found)
  files["modules.json"] = [
    dict(idx=i, name=str(i), path=path, type=f"sentence_transformers.models.{kind}")
    for i, (kind, path) in enumerate(kinds)
  ]
  return files, tensors


def _encoder(layout: Layout, it: Subject) -> Arrays:
  """With zeros for the pooler, which their classes have and nothing reads here."""
  width = it.model.text_tower.options.sizes.width
  pooler = {"pooler.dense.weight": (width, width), "pooler.dense.bias": (width,)}
  zeros = {key: np.zeros(shape, np.float32) for key, shape in pooler.items()}
  return dict(transfer.write(layout, it.arrays)) | zeros


def _modules(it: Subject) -> Iterator[tuple[str, dict[str, Any], Arrays]]:
  """(kind, config, tensors) of what follows the encoder."""
  tower, projector = it.model.text_tower.options, it.model.text_projector
  pooling = {name: pool == tower.pool for pool, name in _POOLS.items()}
  yield "Pooling", dict(word_embedding_dimension=tower.sizes.width, **pooling), {}
  layers = _DENSE[type(projector).__name__]
  if tower.unit and layers:
    yield "Normalize", {}, {}
  for name, function in layers:
    ours = tree.subtree(it.arrays, f"text_projector/{name}/")
    wide, narrow = ours["kernel"].shape
    found = {"linear.weight": np.ascontiguousarray(ours["kernel"].T)}
    found |= {"linear.bias": ours["bias"]} if "bias" in ours else {}
    yield (
      "Dense",
      dict(
        in_features=wide, out_features=narrow, bias="bias" in ours, activation_function=function
      ),
      found,
    )
  yield "Normalize", {}, {}
