"""What an exported folder computes against what the run gave, each by its own library's way."""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from PIL import Image

from bigalign import tree, weights
from bigalign.config import recorded_config
from bigalign.export import torch_module
from bigalign.model import make_model
from bigalign.weights.files import read_json

TOLERANCE = 2e-5  # of the largest logit
SAMPLES = "samples.npz"  # pictures, texts, and the run's logits or embeddings of them


def difference(folder: pathlib.Path) -> float:
  """The largest difference from what is in SAMPLES, relative to the largest number there.

  Raises:
    FileNotFoundError: for a folder that bigalign did not write.
    ModuleNotFoundError: without the format's library.
    ValueError: if the library finds a key missing, or one too many.
  """
  about = folder / "bigalign.json"
  if not about.is_file():
    raise FileNotFoundError(f"{about}: no such file; was {folder} written by bigalign export?")
  kind = read_json(about)["format"]
  if missing(kind):
    raise ModuleNotFoundError(
      f"comparing a folder of the format {kind} needs {' and '.join(missing(kind))}:"
      " pip install 'bigalign[interop]', for open_clip also open_clip_torch"
    )
  reader = READERS[kind]
  with np.load(folder / SAMPLES) as stored:
    texts, expected = stored["texts"].tolist(), stored[reader.what]
    count = sum(name.startswith("image_") for name in stored.files)
    images = [Image.fromarray(stored[f"image_{i}"]) for i in range(count)]
  found = reader.compute(folder, images, texts)
  return float(np.abs(found - expected).max() / np.abs(expected).max())


def possible(kind: str) -> bool:
  """Whether the libraries that read this format are installed."""
  return not missing(kind)


def missing(kind: str) -> list[str]:
  """The packages without which this format's folders are not compared."""
  return [name for name in READERS[kind].needs if importlib.util.find_spec(name) is None]


def _hugging_face(folder: pathlib.Path, images: list[Image.Image], texts: list[str]) -> np.ndarray:
  import torch
  import transformers

  model, info = transformers.AutoModel.from_pretrained(
    folder, local_files_only=True, output_loading_info=True
  )
  _whole(folder, info["missing_keys"], info["unexpected_keys"])
  # torchvision's resizing is another than Pillow's, with which the run's evaluation resizes.
  processor = transformers.AutoProcessor.from_pretrained(
    folder, local_files_only=True, backend="pil"
  )
  inputs = processor(
    text=texts, images=images, padding="max_length", truncation=True, return_tensors="pt"
  )
  with torch.inference_mode():
    return model.eval()(**inputs).logits_per_image.numpy()


def _open_clip(folder: pathlib.Path, images: list[Image.Image], texts: list[str]) -> np.ndarray:
  import open_clip
  import torch

  name = f"local-dir:{folder}"
  model, _, preprocess = open_clip.create_model_and_transforms(name)
  tokenizer = open_clip.get_tokenizer(name)
  pixels = torch.stack([preprocess(image) for image in images])
  with torch.inference_mode():
    logits, _ = model.eval().get_logits(pixels, tokenizer(texts))
  return logits.numpy()


def _sentence_transformers(
  folder: pathlib.Path, images: list[Image.Image], texts: list[str]
) -> np.ndarray:
  import sentence_transformers

  model = sentence_transformers.SentenceTransformer(
    str(folder), device="cpu", local_files_only=True
  )
  return np.asarray(model.encode(texts))


def _torch(folder: pathlib.Path, images: list[Image.Image], texts: list[str]) -> np.ndarray:
  """By the folder's own model.py, which is run: only if it is the one that bigalign writes."""
  source = folder / "model.py"
  if source.read_text() != torch_module.SOURCE.read_text():
    raise ValueError(f"{source}: not as this bigalign writes it, so it is not run to be compared")
  spec = importlib.util.spec_from_file_location("model", source)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.load(folder).logits(images, texts).numpy()


def _big_vision(folder: pathlib.Path, images: list[Image.Image], texts: list[str]) -> np.ndarray:
  """big_vision is no package: the file is read by `weights`, the texts by `tokenizers`."""
  data = recorded_config(read_json(folder / "bigalign.json")).data
  image = np.stack([data.evaluation_view(np.asarray(x)) for x in images])
  tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  about = read_json(folder / "tokenizer_config.json")
  length, pad = about["model_max_length"], about["pad_token"]
  tokenizer.enable_truncation(length)
  tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad, length=length)
  ids = np.asarray([x.ids for x in tokenizer.encode_batch(texts)], np.int32)

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
  return np.exp(t) * np.asarray(feats["zimg"]) @ np.asarray(feats["ztxt"]).T + b


def _whole(folder: pathlib.Path, missing: Any, unexpected: Any) -> None:
  if missing or unexpected:
    raise ValueError(f"{folder}: missing {sorted(missing)}, unexpected {sorted(unexpected)}")


class Reader(NamedTuple):
  """A library: its packages, and what it computes of N pictures and M texts.

  what: "logits" [N, M], or "embeddings" [M, E] where the folder holds the text side alone.
  """

  compute: Callable[[pathlib.Path, list[Image.Image], list[str]], np.ndarray]
  needs: tuple[str, ...]
  what: str = "logits"


READERS = {
  "hf": Reader(_hugging_face, ("torch", "transformers")),
  "open_clip": Reader(_open_clip, ("torch", "torchvision", "open_clip")),
  "torch": Reader(_torch, ("torch", "safetensors")),
  "npz": Reader(_big_vision, ()),
  "sentence-transformers": Reader(
    _sentence_transformers, ("torch", "sentence_transformers"), "embeddings"
  ),
}
