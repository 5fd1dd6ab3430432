"""A model that embeds images and texts: what `bigalign.load` returns."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from bigalign import sharding, tree
from bigalign.api.image_inputs import Images, View, is_array, listed
from bigalign.captions import Captioner
from bigalign.data.image import naflex
from bigalign.data.text.tokenizers import Tokenizer
from bigalign.evals.embed import round_batch, to_host
from bigalign.evals.zeroshot import fill, read_templates
from bigalign.losses.logit_head import LogitHead
from bigalign.model import DualEncoder
from bigalign.run.progress import Progress
from bigalign.towers.padding import cut, used_lengths

Texts: TypeAlias = str | Iterable[str]
Prepared: TypeAlias = Callable[[], dict[str, np.ndarray]]  # waits for the arrays of a batch

_AHEAD = 2  # batches that are prepared while the devices compute
_LATE = 2.0  # seconds before a progress bar appears
_THREADS = 16  # that read images, at most


class Model:
  """Embeds images and texts, and compares them.

  Embeddings are float32 [N, E] of unit norm, so their product is the cosine. All devices share
  the work. A batch is padded, so that a call compiles one shape for images, and a few for texts:
  where the text tower ignores padding, a batch is as long as its longest text, rounded up. So the
  last bits of an embedding depend on the other texts of the call. Of several processes, all call a
  method with the same images or texts; each reads its part, and all get the same result.

  >>> import bigalign
  >>> model = bigalign.load(run)  # run = "runs/quickstart"
  >>> model.embed_images(images).shape, model.embed_texts("a cat").shape  # paths, PIL images ...
  ((5, 64), (1, 64))
  >>> model.similarity(images, ["a cat", "a dog"]).shape
  (5, 2)
  >>> model.classify(images, ["cat", "dog"], templates=["a photo of a {}."]).shape
  (5, 2)
  >>> pixels, (ids, mask) = model.preprocess(images), model.tokenize(["a cat"])
  >>> sorted(model.apply(model.params, pixels, ids, mask))
  ['logits', 'zimg', 'ztxt']

  Attributes:
    source: the run, folder or file that was loaded.
    config: its options in plain values: "model" and "data", of a run all options.
    params: {path: array}, "image_tower/…", "text_projector/…"; "t", the log of the logit scale, and
      "b", the logit bias, if there are any. Every device holds a copy.
    head: scale and bias of the logits, and whether a sigmoid or a softmax follows.
    encoder: the flax module.
    view: how images become the squares that the model sees; None without an image tower.
    tokenizer: of texts; None without a text tower.
  """

  def __init__(
    self,
    *,
    source: str,
    encoder: DualEncoder,
    params: Mapping[str, Any],
    config: Mapping[str, Any],
    head: LogitHead,
    view: View | None,
    tokenizer: Tokenizer | None,
    embed_dim: int,
    clean: Callable[[str], str] | None = None,
    export: Callable[..., Any],
    mesh: jax.sharding.Mesh | None = None,
    captions: Callable[[DualEncoder], tuple[Captioner, dict[str, Any]]] | None = None,
  ) -> None:
    self.source = source
    self.encoder = encoder
    self.config = dict(config)
    self.head = head
    self.view = view
    self.tokenizer = tokenizer
    self.embed_dim = embed_dim
    self.mesh = sharding.make_mesh() if mesh is None else mesh
    everywhere = sharding.replicated_sharding(self.mesh)
    self.params: dict[str, jax.Array] = {
      path: jax.device_put(x, everywhere) for path, x in params.items()
    }
    self._export = export
    self._clean = clean
    self._captions = captions  # makes what writes captions, and the parameters of its head
    self._captioner: tuple[Captioner, dict[str, Any]] | None = None
    self._embed_image, self._embed_text = (
      jax.jit(functools.partial(self._encode, method)) for method in ("embed_image", "embed_text")
    )

  def __repr__(self) -> str:
    parts = [self.source]
    if self.view is not None:
      reading = self.view.reading
      kind = f"{reading.image_size} pixels"
      parts.append(f"images of {f'{reading.naflex.length} patches' if reading.naflex else kind}")
    if self.tokenizer is not None:
      parts.append(f"texts of {self.tokenizer.length} tokens")
    return f"<bigalign.Model {', '.join(parts)}, embeddings of {self.embed_dim}>"

  # ------------------------------------------------------------------ embeddings

  def embed_images(
    self, images: Images, *, batch_size: int = 64, progress: bool = True
  ) -> np.ndarray:
    """Returns the embeddings of images.

    Args:
      images: one image, a list, an iterator or an array of them. An image is a PIL image, the path
        or the bytes of a file, or uint8 [H, W, 3]; kinds can be mixed. Of a model of frames
        (config.data.frames) each may also be a list of images, the frames of one sample, or the
        path of an animation.
      batch_size: images at a time, over all devices.
      progress: whether work of more than two seconds shows a progress bar.

    Returns:
      [N, E] float32, unit norm.

    Raises:
      ValueError, OSError, TypeError: for an image that cannot be read, with its number and path;
        for a model without an image tower.
    """
    return self._of_images(self._embed_views, images, batch_size, progress)

  def _of_images(
    self, call: Callable[..., jax.Array], images: Images, batch_size: int, progress: bool
  ) -> np.ndarray:
    """[N, …]: the results of call(params, *fields of a batch) for all images."""
    view = self._view()
    items, total = listed(images)
    with concurrent.futures.ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:

      def prepare(start: int, part: Sequence[Any], own: Sequence[int]) -> Prepared:
        views = [pool.submit(view.numbered, start + i, part[i]) for i in own]
        return lambda: naflex.to_fields(view.reading.stacked([x.result() for x in views]))

      try:
        return self._embedded(call, items, total, prepare, batch_size, progress)
      finally:
        pool.shutdown(cancel_futures=True)

  def _embed_views(self, params: Mapping[str, Any], *fields: jax.Array) -> jax.Array:
    """[B, E] of the fields of images."""
    z: jax.Array = self._embed_image(params, naflex.of_fields(dict(zip(naflex.FIELDS, fields))))
    return z

  def caption(
    self,
    images: Images,
    *,
    beams: int = 1,
    length_penalty: float = 1.0,
    batch_size: int = 64,
    progress: bool = True,
  ) -> list[str]:
    """Returns the captions that the model writes for images.

    It needs a run with a loss that writes captions, such as config.loss.caption.

    Args:
      images: as of `embed_images`.
      beams: 1 writes the most probable token at each place; more search for a text that is more
        probable as a whole.
      length_penalty: with several beams, the power of the number of tokens by which the log
        probability of a text is divided; 0 prefers short texts.
      batch_size: images at a time, over all devices.
      progress: whether work of more than two seconds shows a progress bar.

    Raises:
      ValueError: for a model that writes no captions, and as `embed_images`.
    """
    if beams < 1:
      raise ValueError(f"beams={beams}: at least 1")
    if self._captions is None:
      raise ValueError(
        f"{self.source} writes no captions: load the run itself, since the decoder of an exported"
        " folder is not read"
      )
    if self._captioner is None:
      self._captioner = self._captions(self.encoder)
    captioner, heads = self._captioner
    own = {f"model/{path}": x for path, x in self.params.items() if "/" in path} | heads

    @jax.jit
    def write(params: Mapping[str, Any], pixels: jax.Array) -> jax.Array:
      with self._precision():
        return captioner.ids(params, pixels, beams=beams, length_penalty=length_penalty)

    def call(params: Mapping[str, Any], *fields: jax.Array) -> jax.Array:
      ids: jax.Array = write(own, naflex.of_fields(dict(zip(naflex.FIELDS, fields))))
      return ids

    return captioner.texts(self._of_images(call, images, batch_size, progress))

  def embed_texts(
    self, texts: Texts, *, batch_size: int = 256, progress: bool = True
  ) -> np.ndarray:
    """Returns the embeddings of texts.

    Args:
      texts: one text, a list or an iterator of them.
      batch_size: texts at a time, over all devices.
      progress: whether work of more than two seconds shows a progress bar.

    Returns:
      [M, E] float32, unit norm.

    Raises:
      TypeError: for something that is not a text, with its number.
      ValueError: for a model without a text tower.
    """
    tokenizer = self._tokenizer()
    listed = [texts] if isinstance(texts, str) else texts
    items: Iterable[str] = (self._texts([text], i)[0] for i, text in enumerate(listed))
    lengths = used_lengths(getattr(self.encoder.text_tower, "options", None))

    def prepare(start: int, part: Sequence[Any], own: Sequence[int]) -> Prepared:
      # Of all rows, also those of other processes, so that all cut to one length.
      ids, mask = tokenizer.encode_batch(part)
      length = cut(lengths(ids, mask), ids.shape[1])
      ids, mask = ids[own, :length], mask[own, :length]
      return lambda: {"ids": ids, "mask": mask}

    def embed(items: Iterable[str], total: int | None) -> np.ndarray:
      return self._embedded(self._embed_text, items, total, prepare, batch_size, progress)

    if not isinstance(listed, Sequence):
      return embed(items, None)
    # Texts of similar lengths share a batch, of which little is padding then.
    known = list(items)
    order = np.argsort([len(text) for text in known], kind="stable")
    z = embed([known[i] for i in order], len(known))
    return z[np.argsort(order)]

  # ------------------------------------------------------------------ comparisons

  def similarity(self, images: Images | np.ndarray, texts: Texts | np.ndarray) -> np.ndarray:
    """Returns the cosine of each image and each text, [N, M] float32.

    Args:
      images: as of `embed_images`, or the embeddings [N, E] that it returned.
      texts: as of `embed_texts`, or the embeddings [M, E] that it returned.
    """
    zimg = self._given(images)
    ztxt = self._given(texts)
    zimg = self.embed_images(images) if zimg is None else zimg  # type: ignore[arg-type]
    ztxt = self.embed_texts(texts) if ztxt is None else ztxt  # type: ignore[arg-type]
    return np.asarray(zimg @ ztxt.T)

  def logits(self, images: Images | np.ndarray, texts: Texts | np.ndarray) -> np.ndarray:
    """Returns the cosines times the model's scale, plus its bias: [N, M] float32.

    The arguments are those of `similarity`.
    """
    return self.head.logits(self.similarity(images, texts))

  def classify(
    self,
    images: Images | np.ndarray,
    names: Sequence[str],
    templates: str | Sequence[str] | None = None,
  ) -> np.ndarray:
    """Returns the probability of each class, for each image.

    Args:
      images: as of `similarity`.
      names: C names of classes, or any C texts.
      templates: prompts with {} or {c} for the name, as a list, a file, or the name of a set:
        "photos", "varied", "simple", "name", or "open_clip" for CLIP's. The embedding of a class is
        the mean over its prompts. None: the names are embedded as they are.

    Returns:
      [N, C] float32. If the model was trained with a sigmoid loss, each is the probability that the
      image matches the class; else those of an image add up to 1.
    """
    return self.head.probabilities(self.similarity(images, self.embed_classes(names, templates)))

  def embed_classes(
    self, names: Sequence[str], templates: str | Sequence[str] | None = None
  ) -> np.ndarray:
    """Returns the embeddings of classes, [C, E] float32, unit norm: a zero-shot classifier.

    The arguments are those of `classify`.
    """
    names = [names] if isinstance(names, str) else list(names)
    if templates is None:
      return self.embed_texts(names)
    chosen = [templates] if isinstance(templates, str) and "{" in templates else templates
    prompts = read_templates(chosen)
    texts = [fill(prompt, name) for name in names for prompt in prompts]
    z = self.embed_texts(texts).reshape(len(names), len(prompts), self.embed_dim).mean(1)
    return np.asarray(z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12))

  # ------------------------------------------------------------------ own loops, files

  def preprocess(self, images: Images) -> Any:
    """Returns images as the model sees them, uint8 [N, S, S, 3]; errors as of `embed_images`.

    Of a NaFlex model they are Patches: pixels [N, P, p * p * 3], their mask [N, P], and rows and
    columns [N, 2]. Normalisation is a part of `apply`.
    """
    view = self._view()
    return view.reading.stacked([view.numbered(i, x) for i, x in enumerate(listed(images)[0])])

  def tokenize(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
    """Returns the token ids of M texts, [M, L] int32, and their mask [M, L], False for padding."""
    items = [texts] if isinstance(texts, str) else list(texts)
    return self._tokenizer().encode_batch(self._texts(items))

  def apply(
    self,
    params: Mapping[str, Any],
    images: Any = None,
    ids: Any = None,
    mask: Any = None,
  ) -> dict[str, jax.Array]:
    """Returns embeddings: a pure function, to be differentiated and compiled.

    Args:
      params: as the attribute `params`.
      images: [N, S, S, 3] uint8, or Patches, as of `preprocess`.
      ids: [M, L] int32, as of `tokenize`.
      mask: [M, L] bool, as of `tokenize`; None: every token counts.

    Returns:
      "zimg" [N, E] for images, "ztxt" [M, E] for ids, float32, unit norm; for both, "logits" [N, M]
      too.
    """
    out = {}
    if images is not None:
      out["zimg"] = self._encode("embed_image", params, images)
    if ids is not None:
      mask = jnp.ones(jnp.shape(ids), bool) if mask is None else mask
      out["ztxt"] = self._encode("embed_text", params, ids, mask)
    if len(out) == 2:
      scale = jnp.exp(params["t"]) if "t" in params else self.head.scale
      with self._precision():
        out["logits"] = scale * (out["zimg"] @ out["ztxt"].T) + params.get("b", self.head.bias)
    return out

  def save(
    self, folder: str | os.PathLike[str], format: str = "hf", **options: Any
  ) -> pathlib.Path:
    """Writes the model for another library, as `bigalign export` does; returns the folder.

    Args:
      folder: new or empty.
      format: "hf", "open_clip", "npz" (big_vision), "torch", "sentence-transformers" (the text
        side).
      **options: of the model card, as of bigalign.export: license, name …

    Raises:
      ValueError: if the format cannot hold the model, with the reasons and the formats that can.
      FileExistsError: if the folder is not empty.
    """
    out, _ = self._export(format, pathlib.Path(folder), **options)
    return pathlib.Path(out)

  # ------------------------------------------------------------------ parts

  def _view(self) -> View:
    if self.view is None:
      raise ValueError(f"{self.source} has no image tower, so it embeds no images")
    return self.view

  def _tokenizer(self) -> Tokenizer:
    if self.tokenizer is None:
      raise ValueError(f"{self.source} has no text tower with a tokenizer, so it embeds no texts")
    return self.tokenizer

  def _texts(self, texts: Sequence[Any], start: int = 0) -> list[str]:
    """The texts as the tokenizer gets them; TypeError for something else, numbered from `start`."""
    for i, text in enumerate(texts, start):
      if not isinstance(text, str):
        raise TypeError(f"texts[{i}] is of type {type(text).__name__}; a text is a str")
    return list(texts) if self._clean is None else [self._clean(text) for text in texts]

  def _given(self, values: Any) -> np.ndarray | None:
    """The values as float32 if they are embeddings [N, E], else None."""
    if not is_array(values):
      return None
    array = np.asarray(values)
    floats = jnp.issubdtype(array.dtype, jnp.floating)
    if not floats or array.ndim != 2 or array.shape[1] != self.embed_dim:
      return None
    return array.astype(np.float32)

  def _precision(self) -> Any:
    """Products of float32 towers are exact on accelerators too, whose default is bfloat16."""
    towers = (self.encoder.image_tower, self.encoder.text_tower)
    dtypes = {getattr(x.options, "dtype", "float32") for x in towers if x is not None}
    return jax.default_matmul_precision("highest" if dtypes == {"float32"} else "default")

  def _encode(self, method: str, params: Mapping[str, Any], *inputs: Any) -> jax.Array:
    """[B, E]: `method` of the encoder."""
    variables = {"params": tree.unflatten({k: x for k, x in params.items() if "/" in k})}
    with self._precision():
      z: Any = self.encoder.apply(variables, *inputs, method=method)
    return jnp.asarray(z)

  def _embedded(
    self,
    embed: Callable[..., jax.Array],
    items: Iterable[Any],
    total: int | None,
    prepare: Callable[[int, Sequence[Any], Sequence[int]], Prepared],
    batch_size: int,
    progress: bool,
  ) -> np.ndarray:
    """[N, E]: embeds items in batches of one size.

    Every process of a run gets all items and returns all embeddings, but prepares only its own rows
    of a batch: prepare(number of the first item, batch, places of the own ones in it).
    """
    if batch_size < 1:
      raise ValueError(f"batch_size={batch_size}: at least 1")
    batch_size = round_batch(self.mesh, batch_size)
    chunks = _chunks(items, batch_size)
    first = next(chunks, None)
    if first is None:
      return np.zeros((0, self.embed_dim), np.float32)
    # Few items do not pay for a whole batch; powers of two limit how many shapes are compiled.
    few = round_batch(self.mesh, 1 << (len(first) - 1).bit_length())
    size = min(batch_size, few)
    rows = sharding.host_rows(self.mesh, size)
    ready: collections.deque[tuple[int, Prepared]] = collections.deque()
    done: list[np.ndarray] = []
    running: tuple[int, jax.Array] | None = None
    start = 0
    visible = progress and jax.process_index() == 0
    with (
      Progress("embed", total or 0, lines=False, after=_LATE, visible=visible) as bar,
      jax.set_mesh(self.mesh),
    ):
      for chunk in itertools.chain([first], chunks, [None] * _AHEAD):
        if chunk is not None:
          own = [int(row) for row in rows if row < len(chunk)] or [0]
          ready.append((len(chunk), prepare(start, chunk, own)))
          start += len(chunk)
          if len(ready) < _AHEAD:
            continue
        if not ready:
          continue
        count, arrays = ready.popleft()
        padded = {k: _padded(x, len(rows)) for k, x in _on_all(arrays).items()}
        on_mesh = sharding.global_batch(self.mesh, padded, rows, size)
        z = sharding.block_on_cpu(embed(self.params, *on_mesh.values()))
        if running is not None:  # the devices compute one batch while the host reads the other
          done.append(to_host(running[1])[: running[0]])
        running = count, z
        if total is None:
          bar.note = f"{bar.clock.done + count:,}"
        bar.advance(count)
      assert running is not None
      done.append(to_host(running[1])[: running[0]])
    return np.concatenate(done)


def _on_all(prepared: Prepared) -> dict[str, np.ndarray]:
  """The arrays; raises on every process of a run if it raises on one, which would wait else."""
  if jax.process_count() == 1:
    return prepared()
  arrays, error = {}, None
  try:
    arrays = prepared()
  except Exception as caught:
    error = caught
  failed = np.asarray(multihost_utils.process_allgather(np.asarray(error is not None)))
  if error is not None:
    raise error
  if failed.any():
    raise RuntimeError(
      f"process {int(failed.argmax())} of the run could not read an item, which its own error names"
    )
  return arrays


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
  """Lists of up to `size` items."""
  iterator = iter(items)
  while chunk := list(itertools.islice(iterator, size)):
    yield chunk


def _padded(x: np.ndarray, size: int) -> np.ndarray:
  """[n, …] -> [size, …]; the first row fills what is missing."""
  return np.concatenate([x, np.repeat(x[:1], size - len(x), axis=0)]) if len(x) < size else x
