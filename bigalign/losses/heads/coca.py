"""CoCa's decoder: captions from the states of a causal text tower and pooled image tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bigalign.losses.base import Loss
from bigalign.losses.heads.base import Head, Read, Writing
from bigalign.losses.heads.caption import SUMS, counted, logits_of, mean_and_accuracy, vocabulary
from bigalign.losses.heads.caption_decoder import Decoder, begin, options_of, read_on
from bigalign.losses.heads.layers import dense_init
from bigalign.towers.base import Places


def coca(
  *,
  depth: int = 12,
  heads: int = 8,
  mlp_ratio: float = 4.0,
  activation: str = "gelu",
  epsilon: float = 1e-5,
  label_smoothing: float = 0.0,
  scan: bool = True,
  remat: str = "none",
) -> Loss:
  """Cross-entropy of the next token, which a decoder predicts from the text so far and the image.

  The text tower is the first half of the decoder: it is causal, and its tokens before the last
  layer norm are the states that this half begins with (config.model.text.pool="class"). Each layer
  is self-attention, cross-attention to the image (config.model.image.pool="queries") and two MLPs.
  Padding does not count. CoCa's loss is clip + 2 coca.

  CoCa, https://arxiv.org/abs/2205.01917, as open_clip implements it.

  >>> from bigalign import losses
  >>> [*losses.make_loss(dict(clip={}, coca=dict(weight=2.0, depth=2))).terms]
  ['clip', 'coca']

  Args:
    depth: layers.
    heads: of attention, in each layer.
    mlp_ratio: hidden units of the MLPs per unit of width.
    activation: of the MLPs.
    epsilon: of the layer norms.
    label_smoothing: share of the label that is spread over all tokens of the vocabulary.
    scan: whether the layers are one program with stacked parameters.
    remat: activations that are kept, as of the towers.

  Raises:
    ValueError: for a text tower that is not causal.
  """
  where = "config.loss.coca"
  given: dict[str, Any] = dict(depth=depth, heads=heads, mlp_ratio=mlp_ratio, activation=activation)
  given |= dict(epsilon=epsilon, scan=scan, remat=remat, two_mlps=True, width=None)

  def decoder(read: Read, tokens: jax.Array) -> Decoder:
    image = read.features["tokens_img"]
    return Decoder(options_of(image.dtype, tokens.shape[-1], **given))

  def init(key: jax.Array, read: Read) -> dict[str, Any]:
    tokens, words = read.features["tokens_txt"], vocabulary(read, where)
    if not read.sizes["causal"]:
      raise ValueError(
        f"{where} predicts the next token from the states of the text tower, which sees it unless"
        " it is causal; set config.model.text=dict(causal=True, pool='class'), or use"
        " config.loss.caption, which has a decoder of its own"
      )
    of_decoder, of_logits = jax.random.split(key)
    variables = decoder(read, tokens).init(of_decoder, tokens, read.features["tokens_img"])
    logits = dense_init(of_logits, tokens.shape[-1], words, bias=False)
    return {"decoder": variables["params"], "logits": logits}

  def apply_head(params: dict[str, Any], averaged: Any, read: Read) -> dict[str, jax.Array]:
    tokens, memory = read.features["tokens_txt"][:, :-1], read.features["tokens_img"]
    # State i predicts token i + 1.
    hidden: Any = decoder(read, tokens).apply({"params": params["decoder"]}, tokens, memory)
    labels, mask = (read.batch[name][:, 1:] for name in ("text", "text_mask"))
    return counted(hidden, params["logits"]["kernel"], labels, mask, label_smoothing)

  def write(params: dict[str, Any], read: Read) -> Writing:
    image, (rows, size) = read.features["tokens_img"], read.batch["text"].shape
    start = jnp.asarray(0)
    # The first step writes over what this token leaves in the caches.
    state, text = read.text_steps(jnp.zeros(rows, jnp.int32), start)
    module, own = decoder(read, state[:, None]), params["decoder"]
    memory, cache = begin(module, own, state[:, None], image, None, Places(start, size))

    def step(before: jax.Array, position: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
      place = jnp.maximum(position - 1, 0)
      state, text = read.text_steps(before, place, cache["text"])
      args = state[:, None], image, None, Places(place, size)
      hidden, decoded = read_on(module, own, (memory, cache["decoder"]), *args)
      # The first token is not predicted: tokenizers that CoCa needs begin each text with the same.
      logits = jnp.where(position > 0, logits_of(hidden[:, 0], params), 0)
      return logits, dict(text=text, decoder=decoded)

    return Writing(step, dict(text=text, decoder=cache))

  head = Head(init, apply_head, sums=SUMS, write=write)
  return Loss(frozenset(), lambda sizes: ({}, {}), mean_and_accuracy, pair=False, head=head)
