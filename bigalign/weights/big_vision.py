"""The layout of big_vision's two_towers (SigLIP, SigLIP 2) as npz, layers separate or stacked."""

from __future__ import annotations

from typing import Any

from bigalign.weights.layout import Layout, Shapes, call, join, sizes
from bigalign.weights.table import Row
from bigalign.weights.timm import depth, dims

_ATTENTION = "MultiHeadDotProductAttention_0"


def big_vision(shapes: Shapes, where: str, prefix: str) -> Layout:
  """The layout of an npz, whose sizes are read from its tensors.

  The options that no tensor determines are SigLIP's: tanh gelu, an epsilon of 1e-6, no mask, the
  last token pooled.

  Raises:
    ValueError: if the keys are not big_vision's.
  """
  prefix = "params/" if any(key.startswith("params/") for key in shapes) else ""
  parts = [
    call(make, {}, where, shapes, f"{prefix}{name}/")
    for name, make in (("img", _image), ("txt", _text))
    if any(key.startswith(f"{prefix}{name}/") for key in shapes)
  ]
  if not parts:
    raise ValueError(f"{where}: neither {prefix}img/… nor {prefix}txt/…; is it from big_vision?")
  scalars = [
    Row(name, f"{prefix}{name}", "1 ->") for name in ("t", "b") if f"{prefix}{name}" in shapes
  ]
  return join(*parts, Layout({}, tuple(scalars)))


def _module(ours: str, theirs: str, layers: int, names: dict[str, str]) -> list[Row]:
  """Rows of norms and linear maps: {our name: their name}."""
  return [
    Row(f"{ours}{name}/{leaf}", f"{theirs}{other}/{leaf}", "", layers)
    for name, other in names.items()
    for leaf in ("scale" if "LayerNorm" in other else "kernel", "bias")
  ]


def _parts(norms: dict[str, str]) -> dict[str, str]:
  """{our name: theirs} of the modules of a block or of the pooling head."""
  attention = {f"attn/{x}": f"{_ATTENTION}/{x}" for x in ("query", "key", "value", "out")}
  return attention | norms | {"mlp/fc1": "MlpBlock_0/Dense_0", "mlp/fc2": "MlpBlock_0/Dense_1"}


def _encoder(shapes: Shapes, ours: str, theirs: str) -> tuple[list[Row], dict[str, Any]]:
  """(rows of the blocks and the last norm, options of the sizes)."""
  first = f"{theirs}encoderblock_0/"
  layers, stacked = depth(shapes, f"{theirs}encoderblock_", "/"), 0
  other = f"{theirs}encoderblock_{{}}/"
  if not layers:
    first = other = f"{theirs}encoderblock/"
    layers, stacked = dims(shapes, f"{first}LayerNorm_0/scale", 2)[0], 1
  query = dims(shapes, f"{first}{_ATTENTION}/query/kernel", 3 + stacked)
  hidden = dims(shapes, f"{first}MlpBlock_0/Dense_0/kernel", 2 + stacked)[-1]
  parts = _parts({"ln1": "LayerNorm_0", "ln2": "LayerNorm_1"})
  rows = [
    *_module(f"{ours}encoder/block_{{}}/", other, layers, parts),
    *(Row(f"{ours}encoder/ln/{x}", f"{theirs}encoder_norm/{x}") for x in ("scale", "bias")),
  ]
  return rows, sizes(query[stacked], layers, query[stacked + 1], hidden)


def _image(shapes: Shapes, theirs: str) -> Layout:
  """The layout of the image tower."""
  ours = "image_tower/"
  patch, *_ = dims(shapes, f"{theirs}embedding/kernel", 4)
  _, count, _ = dims(shapes, f"{theirs}pos_embedding", 3)
  rows, size = _encoder(shapes, ours, f"{theirs}Transformer/")
  head = f"{theirs}MAPHead_0/"
  options = dict(name="vit", patch=patch, pool="map", activation="gelu_tanh", **size)
  return Layout(
    {
      "image": options,
      "image_projector": dict(name="identity"),
      "pixels": "half",
      "embed_dim": size["width"],
    },
    (
      *_module(ours, theirs, 0, {"embedding": "embedding"}),
      Row(
        f"{ours}positions", f"{theirs}pos_embedding", "1 n d -> 1 n d", resize="bilinear_corners"
      ),
      *rows,
      Row(f"{ours}map_head/probe", f"{head}probe"),
      *_module(f"{ours}map_head/", head, 0, _parts({"ln": "LayerNorm_0"})),
    ),
    data={"image_size": round(count**0.5) * patch},
  )


def _text(shapes: Shapes, theirs: str) -> Layout:
  """The layout of the text tower and its head."""
  ours = "text_tower/"
  vocab, _ = dims(shapes, f"{theirs}Embed_0/embedding", 2)
  _, length, _ = dims(shapes, f"{theirs}pos_embedding", 3)
  rows, size = _encoder(shapes, ours, f"{theirs}Encoder_0/")
  options = dict(
    name="text",
    vocab_size=vocab,
    length=length,
    pool="last",
    mask_padding=False,
    activation="gelu_tanh",
    **size,
  )
  return Layout(
    {
      "text": options,
      "text_projector": dict(name="linear", bias=True),
      "embed_dim": dims(shapes, f"{theirs}head/kernel", 2)[1],
    },
    (
      Row(f"{ours}embedding", f"{theirs}Embed_0/embedding"),
      Row(f"{ours}positions", f"{theirs}pos_embedding"),
      *rows,
      *_module("text_projector/", theirs, 0, {"out": "head"}),
    ),
    data={"length": length},
  )
