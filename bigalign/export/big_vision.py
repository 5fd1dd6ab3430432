"""The format npz: two towers as a two_towers model of big_vision."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from PIL import Image

from bigalign import tree, weights
from bigalign.config import recorded_config
from bigalign.export.base import DOWNLOADED, Format, TrainedModel
from bigalign.export.fit import Family, Fitted, first_fit
from bigalign.model import make_model
from bigalign.weights.files import read_json


def _keys(trained: TrainedModel) -> dict[str, jax.ShapeDtypeStruct]:
  """{key: shape} of the tensors from which the reader of an npz takes the sizes."""
  image, text = trained.image, trained.text
  side = trained.data.image_size // image.patch
  shapes: dict[str, tuple[int, ...]] = {
    "params/img/embedding/kernel": (image.patch, image.patch, 3, image.sizes.width),
    "params/img/pos_embedding": (1, side * side, image.sizes.width),
    "params/txt/Embed_0/embedding": (text.vocab_size, text.sizes.width),
    "params/txt/pos_embedding": (1, text.length, text.sizes.width),
    "params/txt/head/kernel": (text.sizes.width, trained.model.text_projector.dim),
    **{f"params/{name}": (1,) for name in ("t", "b") if name in trained.arrays},
  }
  for start, (width, depth, heads, hidden) in (
    ("img/Transformer", image.sizes),
    ("txt/Encoder_0", text.sizes),
  ):
    for i in range(depth):
      block = f"params/{start}/encoderblock_{i}"
      query = f"{block}/MultiHeadDotProductAttention_0/query/kernel"
      shapes |= {
        query: (width, heads, width // heads),
        f"{block}/MlpBlock_0/Dense_0/kernel": (width, hidden),
      }
  return {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in shapes.items()}


FAMILIES = (
  Family("big_vision's two_towers", "big_vision", ("vit", "text"), lambda trained: {}, _keys),
)


def _files(fitted: Fitted, trained: TrainedModel) -> dict[str, Any]:
  """The tokenizer; an npz has no config."""
  return trained.tokenizer_files()


def _compute(
  folder: pathlib.Path, images: Sequence[Image.Image], texts: Sequence[str]
) -> np.ndarray:
  """The logits with our reader of npz files and the library tokenizers.

  big_vision cannot be installed as a package.
  """
  data = recorded_config(read_json(folder / "bigalign.json")).data
  image = np.stack([data.evaluation_view(np.asarray(x)) for x in images])
  tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  about = read_json(folder / "tokenizer_config.json")
  length, pad = about["model_max_length"], about["pad_token"]
  tokenizer.enable_truncation(length)
  tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad, length=length)
  ids = np.asarray([x.ids for x in tokenizer.encode_batch(list(texts))], np.int32)

  checkpoint = weights.describe(folder / "model.npz")
  sides = {k: {**checkpoint.model[k], "dtype": "float32"} for k in ("image", "text")}
  model = make_model(**{**checkpoint.model, **sides})
  shapes = tree.flatten(jax.eval_shape(model.init, jax.random.key(0), image, ids)["params"])
  scalars = {
    str(row.ours): jax.ShapeDtypeStruct((), jnp.float32)
    for row in checkpoint.layout.rows
    if row.ours in ("t", "b")
  }
  arrays = checkpoint.load(shapes | scalars)
  t, b = arrays.pop("t"), arrays.pop("b", np.float32(0))
  with jax.default_matmul_precision("highest"):
    feats = jax.jit(model.apply)({"params": tree.unflatten(arrays)}, image, ids)
  return np.asarray(np.exp(t) * np.asarray(feats["zimg"]) @ np.asarray(feats["ztxt"]).T + b)


_USAGE = """`model.npz` is a checkpoint of big_vision's `two_towers`.

```python
from big_vision.models.proj.image_text import two_towers
from ml_collections import ConfigDict

folder = "DIR"
config = ConfigDict({
  "image": {image},
  "text": {text},
  "out_dim": (None, {dim}),{bias_init}
})
params = two_towers.load(None, f"{folder}/model.npz", config)
zimg, ztxt, out = two_towers.Model(**config).apply({"params": params}, images, texts)
logits = out["t"] * zimg @ ztxt.T{bias}
```

`images`: float32 [N, {size}, {size}, 3], `pixels / 127.5 - 1`. `texts`: int32 [M, {length}], the
token ids of `tokenizer.json` (library `tokenizers`), padded to {length}.
"""


def _usage(trained: TrainedModel) -> str:
  """The part of the model card that shows how to load the folder."""

  def options(tower: Any, **others: Any) -> str:
    width, depth, heads, hidden = tower.sizes
    named = dict(width=width, depth=depth, num_heads=heads, mlp_dim=hidden)
    return repr(named | others)

  values = {
    "image": options(trained.image, patch_size=(trained.image.patch,) * 2, pool_type="map"),
    "text": options(trained.text, vocab_size=trained.text.vocab_size, pool_type="last"),
    "dim": trained.model.text_projector.dim,
    "bias_init": '\n  "bias_init": 0.0,' if "b" in trained.arrays else "",
    "bias": ' + out["b"]' if "b" in trained.arrays else "",
    "size": trained.data.image_size,
    "length": trained.text.length,
  }
  usage = _USAGE
  for name, value in values.items():
    usage = usage.replace("{" + name + "}", str(value))
  return usage


FORMAT = Format(
  name="npz",
  prepare=functools.partial(first_fit, FAMILIES, "model.npz", _files),
  compute=_compute,
  heads=False,  # a folder with two files of weights has none that is meant
  library="big_vision",
  tags=("jax",),
  usage=_usage,
  on_hub=DOWNLOADED,
)
