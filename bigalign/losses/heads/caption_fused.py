"""Captions from one sequence of image tokens, text states and queries, as in OpenVision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigalign import checks
from bigalign.losses.base import Loss
from bigalign.losses.heads import masks
from bigalign.losses.heads.base import Head, Read, Writing
from bigalign.losses.heads.caption import SUMS, counted, logits_of, mean_and_accuracy, vocabulary
from bigalign.losses.heads.caption_decoder import (
  Decoder,
  DecoderOptions,
  begin,
  options_of,
  read_on,
)
from bigalign.losses.heads.layers import dense_init
from bigalign.towers.base import HIDDEN, Places
from bigalign.towers.linear import Dense, lookup
from bigalign.towers.vit import some_patches

INPUTS = ("queries", "tokens")


class Fused(nn.Module):
  """A decoder of one sequence: prefixes, which all see, and the places of a caption, causal.

  Args:
    options: see DecoderOptions.
    length: tokens of a caption.
    rows: of the token table; 0: learned queries in place of tokens.
  """

  options: DecoderOptions
  length: int
  rows: int

  @nn.compact
  def __call__(
    self, prefixes: Mapping[str, jax.Array], ids: jax.Array, places: Places | None = None
  ) -> jax.Array:
    """{name: [B, n, any width]}, [B, L] int32 -> [B, L, D], of the places of the caption.

    With `places`, the decoder reads all prefixes, if there are some, or one place of the caption,
    and `ids` [B, 1] is the token before it.
    """
    width, dtype = self.options.sizes.width, self.options.compute_dtype
    parts = [Dense(width, dtype=dtype, name=name)(x) for name, x in prefixes.items()]
    decoder = Decoder(self.options, name="decoder")
    if places is not None and parts:
      read: jax.Array = decoder(jnp.concatenate(parts, 1), None, None, places)
      return read
    normal = nn.initializers.normal(0.02)
    own = self.param("queries", normal, (1, self.length, width)).astype(dtype)
    if places is not None:
      own = jax.lax.dynamic_slice_in_dim(own, places.first - places.size + self.length, 1, 1)
    own = jnp.broadcast_to(own, (len(ids), *own.shape[1:]))
    if self.rows:
      table = self.param("embedding", normal, (self.rows, width))
      shifted = jnp.pad(ids[:, :-1], ((0, 0), (1, 0))) if places is None else ids
      own = own + lookup(table, shifted, dtype)
    if places is not None:
      state: jax.Array = decoder(own, None, None, places)
      return state
    x = jnp.concatenate([*parts, own], 1)
    before = x.shape[1] - self.length
    column = np.arange(x.shape[1])
    # A place sees all prefixes and the places up to itself; a prefix sees all prefixes.
    seen = column[None] <= np.maximum(column, before - 1)[:, None]
    visible = jnp.where(seen, 0.0, HIDDEN)[None, None]
    decoded: jax.Array = decoder(x, None, visible)
    return decoded[:, before:]


def caption_fused(
  *,
  inputs: str = "queries",
  reads_text: bool = False,
  second: bool = False,
  keep: float = 1.0,
  depth: int = 6,
  width: int | None = None,
  heads: int | None = None,
  mlp_ratio: float = 4.0,
  label_smoothing: float = 0.0,
  scan: bool = True,
  remat: str = "none",
) -> Loss:
  """Cross-entropy of a caption, by a decoder without cross-attention: image tokens are its prefix.

  OpenVision, https://arxiv.org/abs/2505.04601: the prefix is the tokens of the image and the states
  of the text tower of one caption (reads_text), and learned queries predict another caption
  (second), each from the queries before it and the prefix. OpenVision 2,
  https://arxiv.org/abs/2509.01644: no text tower and no contrastive loss, and a random 25 to 35 %
  of the image tokens (keep). The weight of the term is 2 in both. What the tokens of a prefix see
  of each other (all) is a choice of this implementation.

  >>> from bigalign import losses
  >>> [*losses.make_loss(dict(caption_fused=dict(weight=2.0, keep=0.35))).terms]
  ['caption_fused']

  Args:
    inputs: "queries", or "tokens": the tokens of the caption before the predicted one, as in other
      language models.
    reads_text: whether the states of the text tower are a part of the prefix, which needs `second`:
      otherwise they would show the decoder the caption that it predicts.
    second: whether the other caption of the image is predicted (config.data.second_captions).
    keep: share of the image tokens that the decoder reads, drawn for each image.
    depth: layers of the decoder.
    width: of its tokens; None: that of the text tower's.
    heads: of attention; None: one for 64 units of the width.
    mlp_ratio: hidden units of its MLPs per unit of width.
    label_smoothing: share of the label that is spread over all tokens of the vocabulary.
    scan: whether its layers are one program with stacked parameters.
    remat: activations that are kept, as of the towers.

  Raises:
    ValueError: for an unknown name, a share out of range, or reads_text without second.
  """
  where = "config.loss.caption_fused"
  checks.known(f"{where}.inputs", inputs, INPUTS)
  if not 0 < keep <= 1:
    raise ValueError(f"{where}.keep={keep}: more than 0 and at most 1")
  if reads_text and not second:
    raise ValueError(
      f"{where}.reads_text=True shows the decoder the caption that it predicts; set {where}.second="
      "True with config.data.second_captions, so that it predicts another one"
    )
  given: dict[str, Any] = dict(
    depth=depth, width=width, heads=heads, mlp_ratio=mlp_ratio, scan=scan, remat=remat
  )
  labels_of, mask_of = ("text_second", "text_second_mask") if second else ("text", "text_mask")

  def prefixes(read: Read) -> dict[str, jax.Array]:
    image = read.features["tokens_img"]
    if "kept" in read.batch:
      image = jnp.take_along_axis(image, read.batch["kept"][..., None], 1)
    return {"image": image} | ({"text": read.features["tokens_txt"]} if reads_text else {})

  def decoder(read: Read) -> Fused:
    image, words = read.features["tokens_img"], vocabulary(read, where)
    text_width = read.features["tokens_txt"].shape[-1]
    options = options_of(image.dtype, text_width, **given)
    rows = words if inputs == "tokens" else 0
    return Fused(options, read.batch[labels_of].shape[1], rows)

  def states(params: Mapping[str, Any], read: Read) -> jax.Array:
    """[b, L, D]: state i predicts token i."""
    out: Any = decoder(read).apply({"params": params["decoder"]}, prefixes(read), _ids(read))
    return jnp.asarray(out)

  def _ids(read: Read) -> jax.Array:
    return read.batch[labels_of]

  def draw(
    key: jax.Array, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, Any]
  ) -> dict[str, jax.Array]:
    if keep == 1:
      return {}
    shape = shapes["image"]
    return {"kept": some_patches(key, shape[0], masks.patches(shape, sizes), keep)}

  def init(key: jax.Array, read: Read) -> dict[str, Any]:
    module, words = decoder(read), vocabulary(read, where)
    of_decoder, of_logits = jax.random.split(key)
    variables = module.init(of_decoder, prefixes(read), _ids(read))
    logits = dense_init(of_logits, module.options.sizes.width, words, bias=False)
    return {"decoder": variables["params"], "logits": logits}

  def apply_head(params: dict[str, Any], averaged: Any, read: Read) -> dict[str, jax.Array]:
    labels, mask = _ids(read), read.batch[mask_of]
    kernel = params["logits"]["kernel"]
    return counted(states(params, read), kernel, labels, mask, label_smoothing)

  def write(params: dict[str, Any], read: Read) -> Writing:
    module, own, parts = decoder(read), params["decoder"], prefixes(read)
    before = sum(x.shape[1] for x in parts.values())
    size = before + module.length
    every = Places(jnp.asarray(0), size, both=True)
    memory, cache = begin(module, own, parts, _ids(read), every)

    def step(ids: jax.Array, position: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
      args: Any = {}, ids[:, None], Places(before + position, size)
      hidden, cache = read_on(module, own, (memory, cache), *args)
      return logits_of(hidden[:, 0], params), cache

    return Writing(step, cache)

  fields = frozenset({labels_of, mask_of} if second else ())
  head = Head(
    init,
    apply_head,
    fields=fields,
    draw=draw,
    sums=SUMS,
    write=None if second else write,
  )
  return Loss(frozenset(), lambda sizes: ({}, {}), mean_and_accuracy, pair=False, head=head)
