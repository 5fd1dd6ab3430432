"""Lets CLIP_benchmark and mteb evaluate a loaded model as one of their own.

They run PyTorch; the model stays in JAX, and only batches of inputs and of embeddings change hands.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh

from bigalign import sharding
from bigalign.data.files import fingerprints
from bigalign.data.image import naflex
from bigalign.evals.embed import round_batch, to_host
from bigalign.options import fingerprint
from bigalign.towers.padding import cut, used_lengths

Tensor: TypeAlias = Any  # of PyTorch, which is imported when it is needed

_ROWS = 16  # of which the size of a compiled batch is a multiple


class Loaded(Protocol):
  """What the adapters use of a `bigalign.Model`."""

  source: str
  encoder: Any
  params: Any
  view: Any
  tokenizer: Any
  embed_dim: int
  mesh: Mesh

  def apply(
    self, params: Any, images: Any = None, ids: Any = None, mask: Any = None
  ) -> dict[str, jax.Array]: ...
  def tokenize(self, texts: Any) -> tuple[np.ndarray, np.ndarray]: ...
  def embed_images(self, images: Any, *, batch_size: int = 64) -> np.ndarray: ...
  def embed_texts(self, texts: Any) -> np.ndarray: ...


def _module(name: str) -> Any:
  """A module of an optional library; ModuleNotFoundError that names the extra."""
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"{name} needs {error.name}, which is not installed: pip install 'bigalign[eval]'"
    ) from error


class _Padded:
  """Embeds batches of any size. Smaller ones are padded to the largest so far: it compiles once."""

  def __init__(self, model: Loaded, embed: Callable[..., jax.Array]) -> None:
    self._model, self._embed, self._size = model, jax.jit(embed), 0

  def __call__(self, fields: Mapping[str, np.ndarray]) -> np.ndarray:
    """[n, E] float32 of arrays [n, …]."""
    mesh, count = self._model.mesh, len(next(iter(fields.values())))
    if not count:
      return np.zeros((0, self._model.embed_dim), np.float32)
    self._size = max(self._size, round_batch(mesh, -(-count // _ROWS) * _ROWS))
    rows = sharding.host_rows(mesh, self._size)
    padded = {name: np.resize(x, (self._size, *x.shape[1:])) for name, x in fields.items()}
    with jax.set_mesh(mesh):
      on_mesh = sharding.global_batch(mesh, padded, rows, self._size)
      z = sharding.block_on_cpu(self._embed(self._model.params, *on_mesh.values()))
    return np.array(to_host(z)[:count], np.float32)


class _Transform:
  """How CLIP_benchmark's datasets turn an image into a tensor: the model's own preprocessing."""

  def __init__(self, view: Any) -> None:
    self._view = view

  def __call__(self, image: Any) -> Tensor:
    """uint8 [S, S, 3]; of a model of frames [F, S, S, 3], of a NaFlex model int16 [N, K + 3].

    The last three columns of N patches are their mask, and the rows and columns of the image.
    """
    import torch

    seen = self._view(image)
    if isinstance(seen, naflex.Patches):
      shapes = np.broadcast_to(seen.shapes, (len(seen.mask), 2))
      seen = np.concatenate([seen.pixels, seen.mask[:, None], shapes], axis=1, dtype=np.int16)
    return torch.from_numpy(np.array(seen))

  def fields(self, images: np.ndarray) -> dict[str, np.ndarray]:
    """The fields of a batch of what `__call__` returned."""
    if not self._view.reading.naflex:
      return {"image": images}
    pixels, mask, shapes = np.split(images, [-3, -2], axis=2)
    patches = (pixels.astype(np.uint8), mask[:, :, 0] > 0, shapes[:, 0].astype(np.int32))
    return dict(zip(naflex.FIELDS, patches))


class _Tokenizer:
  """Texts to a tensor, int64 [N, L]: the id of a token, and ~id of padding, which is below 0."""

  def __init__(self, model: Loaded) -> None:
    self._model = model

  def __call__(self, texts: str | Sequence[str]) -> Tensor:
    import torch

    ids, mask = self._model.tokenize(texts)
    return torch.from_numpy(np.where(mask, ids, ~ids).astype(np.int64))


class _Clip:
  """The model as CLIP_benchmark calls it, with tensors of PyTorch."""

  def __init__(self, model: Loaded, transform: _Transform) -> None:
    def embed_image(params: Any, *fields: jax.Array) -> jax.Array:
      return model.apply(params, naflex.of_fields(dict(zip(naflex.FIELDS, fields))))["zimg"]

    def embed_text(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
      return model.apply(params, ids=ids, mask=mask)["ztxt"]

    self._fields = transform.fields
    self._image, self._text = _Padded(model, embed_image), _Padded(model, embed_text)
    self._lengths = used_lengths(getattr(model.encoder.text_tower, "options", None))
    self._length = 0  # of the longest texts so far

  def encode_image(self, images: Tensor) -> Tensor:
    """[B, E] float32, unit norm, of a batch of what the transform returns."""
    import torch

    z = self._image(self._fields(images.cpu().numpy()))
    return torch.from_numpy(z).to(images.device)

  def encode_text(self, texts: Tensor) -> Tensor:
    """[B, E] float32, unit norm, of what the tokenizer returns."""
    import torch

    ids = texts.cpu().numpy()
    mask = ids >= 0
    ids = np.where(mask, ids, ~ids).astype(np.int32)
    self._length = max(self._length, cut(self._lengths(ids, mask), ids.shape[1]))
    z = self._text({"ids": ids[:, : self._length], "mask": mask[:, : self._length]})
    return torch.from_numpy(z).to(texts.device)

  def eval(self) -> _Clip:
    """Itself: nothing is trained here."""
    return self

  def to(self, device: Any) -> _Clip:
    """Itself: JAX chose the devices."""
    del device
    return self


def _accuracy(output: Any, target: Any, topk: Sequence[int] = (1,)) -> list[float]:
  """The shares of targets [N] among the k largest outputs [N, K], for each k."""
  hits = output.topk(max(topk), 1).indices == target[:, None]
  return [float(hits[:, :k].sum()) / len(target) for k in topk]


def clip_benchmark(model: Loaded) -> tuple[Any, Any, Any]:
  """Returns (model, transform, tokenizer) for the metrics of CLIP_benchmark.

    from clip_benchmark.metrics import zeroshot_classification

    clip, transform, tokenizer = adapters.clip_benchmark(bigalign.load("runs/siglip"))
    loader = DataLoader(MyImages(transform=transform), batch_size=64)
    zeroshot_classification.evaluate(clip, loader, tokenizer, names, templates, "cpu", amp=False)

  Its `amp=True` multiplies embeddings in bfloat16 or float16, which changes scores. Batches have
  one shape, to which the last one is padded.

  Args:
    model: of bigalign.load, with both towers.

  Raises:
    ModuleNotFoundError: without CLIP_benchmark.
    ValueError: for a model of one tower.
  """
  if model.view is None or model.tokenizer is None:
    raise ValueError(f"{model.source}: CLIP_benchmark needs an image tower and a text tower")
  # Its own accuracy() converts an array of one element to a float, which numpy 2.4 refuses.
  for name in ("zeroshot_classification", "linear_probe"):
    _module(f"clip_benchmark.metrics.{name}").accuracy = _accuracy
  transform = _Transform(model.view)
  return _Clip(model, transform), transform, _Tokenizer(model)


def register_clip_benchmark(load: Callable[[str], Loaded]) -> None:
  """Makes --model_type=bigalign known to the command line of CLIP_benchmark.

  Then --pretrained names the run or folder, and --model is any name for the results.

  Args:
    load: bigalign.load.
  """
  models = _module("clip_benchmark.models")

  def loaded(
    model_name: str, pretrained: str, cache_dir: str | None, device: Any
  ) -> tuple[Any, Any, Any]:
    del model_name, cache_dir, device
    return clip_benchmark(load(pretrained))

  models.TYPE2FUNC["bigalign"] = loaded
  if "bigalign" not in models.MODEL_TYPES:
    models.MODEL_TYPES.append("bigalign")


def mteb(model: Loaded, name: str = "") -> Any:
  """Returns the model as an encoder of mteb, for its tasks of images, of texts and of both (MIEB).

    results = mteb.evaluate(adapters.mteb(bigalign.load("runs/siglip")), mteb.get_tasks(["STS12"]))

  The embedding of a sample with a text and an image is the sum of both, as in mteb's own CLIP. The
  revision, by which mteb keeps results, changes with the weights, the preprocessing and the code.

  Args:
    model: of bigalign.load; one with one tower evaluates tasks of its side.
    name: "organisation/model" for the results; "": made from the place of the model.

  Raises:
    ModuleNotFoundError: without mteb.
  """
  metas = _module("mteb.models.model_meta")
  sides = {"image": model.view, "text": model.tokenizer}
  known = [side for side, there in sides.items() if there is not None]

  class Encoder(_module("mteb.models.abs_encoder").AbsEncoder):  # type: ignore[misc]
    """Embeds what the data loaders of mteb yield."""

    def __init__(self) -> None:
      self.model = model
      self.mteb_model_meta = metas.ModelMeta(
        loader=None,
        name=name or "bigalign/" + re.sub(r"\W+", "-", pathlib.PurePath(model.source).name),
        revision=_revision(model),
        release_date=None,
        languages=None,
        n_parameters=sum(x.size for x in model.params.values()),
        memory_usage_mb=sum(x.nbytes for x in model.params.values()) / 2**20,
        max_tokens=model.tokenizer.length if model.tokenizer else None,
        embed_dim=model.embed_dim,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["JAX"],
        similarity_fn_name=metas.ScoringFunction.COSINE,
        use_instructions=False,
        training_datasets=None,
        modalities=known,
      )

    def encode(
      self, inputs: Iterable[Mapping[str, Any]], *, batch_size: int = 64, **options: Any
    ) -> np.ndarray:
      """[N, E] float32.

      Args:
        inputs: batches with PIL images in "image", texts in "text", or both.
        batch_size: images at a time.
        **options: of mteb, such as the task; no embedding depends on them.
      """
      del options
      batches = iter(inputs)
      first = next(batches, {})
      given = [side for side in sides if side in first]
      if (first and not given) or not {*given} <= {*known}:
        raise ValueError(
          f"{model.source} embeds {' and '.join(known)}; a batch has {sorted(first)}"
        )
      return _embedded(model, itertools.chain([first], batches), given, batch_size)

  return Encoder()


def _embedded(
  model: Loaded,
  batches: Iterable[Mapping[str, Any]],
  given: Sequence[str],
  batch_size: int,
) -> np.ndarray:
  """[N, E]: the embeddings of what is given, or their sum."""
  texts: list[str] = []

  def images() -> Iterator[Any]:  # read once; texts that come with images are few bytes
    for batch in batches:
      texts.extend(batch.get("text", ()))
      yield from batch.get("image", ())

  if "image" not in given:
    return model.embed_texts([text for batch in batches for text in batch.get("text", ())])
  zimg = model.embed_images(images(), batch_size=batch_size)
  return zimg + model.embed_texts(texts) if "text" in given else zimg


def _revision(model: Loaded) -> str:
  """Hex digits of what the embeddings of a model depend on."""
  weights = {
    path: hashlib.sha256(to_host(x).tobytes()).hexdigest() for path, x in model.params.items()
  }
  encoder = re.sub(r" at 0x\w+", "", repr(model.encoder))
  view = model.view.reading.preprocessing() if model.view else {}
  texts = [model.tokenizer.spec, model.tokenizer.from_files] if model.tokenizer else []
  return fingerprint([weights, encoder, view, texts, fingerprints.of_code()])
