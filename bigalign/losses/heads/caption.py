"""Captions that a cross-attending decoder writes, as in CapPa, LocCa and SigLIP 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigalign.data.fields import locations
from bigalign.losses.base import Context, Features, Loss, Params, State
from bigalign.losses.heads.base import Head, Read, Writing, mean_over_batch
from bigalign.losses.heads.caption_decoder import TokenDecoder, begin, options_of, read_on
from bigalign.losses.heads.vocabulary import token_losses
from bigalign.towers.base import HIDDEN, Places


class Inputs(NamedTuple):
  """What a decoder reads, and which tokens it sees.

  Args:
    ids: [b, L] int32.
    visible: [b, 1, L, L] bool, whether a token sees another one.
  """

  ids: jax.Array
  visible: jax.Array


def inputs(labels: jax.Array, parallel: jax.Array, mask_id: int, start: int = 0) -> Inputs:
  """The inputs from which a decoder predicts a caption, CapPa, https://arxiv.org/abs/2306.07915.

  One token after the other, each input is the label before it and sees those up to itself. In
  parallel, every input is the mask token, and sees all of them: only positions and image remain.

  Args:
    labels: [b, L] int32.
    parallel: [b] bool, which captions are predicted in parallel.
    mask_id: of the mask token.
    start: id before the first label.
  """
  first = jnp.full_like(labels[:, :1], start)
  shifted = jnp.concatenate([first, labels[:, :-1]], 1)
  ids = jnp.where(parallel[:, None], mask_id, shifted)
  length = labels.shape[1]
  causal = jnp.tril(jnp.ones((length, length), bool))
  return Inputs(ids, causal[None, None] | parallel[:, None, None, None])


def caption(
  *,
  parallel: float = 0.5,
  tasks: bool = False,
  depth: int = 6,
  width: int | None = None,
  heads: int | None = None,
  mlp_ratio: float = 4.0,
  bias: bool = False,
  label_smoothing: float = 0.0,
  scan: bool = True,
  remat: str = "none",
) -> Loss:
  """Cross-entropy of the tokens of a caption, which a decoder predicts from those of the image.

  The decoder reads the tokens of the image tower before pooling. It predicts a share of the
  captions in parallel, from positions and image alone, and the others token by token. Padding does
  not count; the loss is the mean over all other tokens of the batch.

  CapPa, https://arxiv.org/abs/2306.07915 (parallel=0.75, depth=6, no biases, logits that start at
  0); LocCa, https://arxiv.org/abs/2403.19596; SigLIP 2, https://arxiv.org/abs/2502.14786
  (parallel=0.5, half the layers of its text tower, weight equal to that of the sigmoid loss).
  Initial values of tokens (0.02) and positions (0.01) are a choice of this implementation.

  >>> from bigalign import losses
  >>> [*losses.make_loss(dict(siglip={}, caption=dict(depth=2))).terms]
  ['siglip', 'caption']

  Args:
    parallel: share of the captions that are predicted in parallel, drawn for each one.
    tasks: whether the texts are those of config.data.locations, of which some have boxes, as in
      LocCa. What names the task is given, and texts with boxes are predicted token by token.
    depth: layers of the decoder.
    width: of its tokens; None: that of the text tower's.
    heads: of attention; None: one for 64 units of the width.
    mlp_ratio: hidden units of its MLPs per unit of width.
    bias: whether its linear maps and norms have biases.
    label_smoothing: share of the label that is spread over all tokens of the vocabulary.
    scan: whether its layers are one program with stacked parameters.
    remat: activations that are kept, as of the towers.

  Raises:
    ValueError: for a share out of range.
  """
  where = "config.loss.caption"
  for name, share in dict(parallel=parallel, label_smoothing=label_smoothing).items():
    if not 0 <= share <= 1:
      raise ValueError(f"{where}.{name}={share}: at least 0 and at most 1")
  given: dict[str, Any] = dict(
    depth=depth, width=width, heads=heads, mlp_ratio=mlp_ratio, bias=bias, scan=scan, remat=remat
  )
  labels_of, mask_of = (locations.TEXT, locations.COUNTED) if tasks else ("text", "text_mask")

  def decoder(read: Read) -> TokenDecoder:
    image, words = read.features["tokens_img"], vocabulary(read, where)
    text_width = read.features["tokens_txt"].shape[-1]
    options = options_of(image.dtype, text_width, **given)
    return TokenDecoder(options, words + 1, read.batch[labels_of].shape[1])

  def states(params: Mapping[str, Any], read: Read, parallel: jax.Array) -> jax.Array:
    """[b, L, D]: state i predicts token i."""
    module, words = decoder(read), vocabulary(read, where)
    ids, visible = inputs(read.batch[labels_of], parallel, mask_id=words)
    bias = jnp.where(visible, 0.0, HIDDEN)
    memory = read.features["tokens_img"]
    out: Any = module.apply({"params": params["decoder"]}, ids, memory, bias)
    return jnp.asarray(out)

  def draw(
    key: jax.Array, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, Any]
  ) -> dict[str, jax.Array]:
    return {"parallel": jax.random.bernoulli(key, parallel, shapes["text"][:1])}

  def init(key: jax.Array, read: Read) -> dict[str, Any]:
    module, words = decoder(read), vocabulary(read, where)
    ids = read.batch[labels_of]
    variables = module.init(key, ids, read.features["tokens_img"], None)
    kernel = jnp.zeros((module.options.sizes.width, words), jnp.float32)
    return {"decoder": variables["params"], "logits": {"kernel": kernel}}

  def apply_head(params: dict[str, Any], averaged: Any, read: Read) -> dict[str, jax.Array]:
    parallel, labels, mask = (read.batch[name] for name in ("parallel", labels_of, mask_of))
    if tasks:
      parallel = parallel & (read.batch[locations.TASK] == 0)
    hidden = states(params, read, parallel)
    return counted(hidden, params["logits"]["kernel"], labels, mask, label_smoothing)

  def write(params: dict[str, Any], read: Read) -> Writing:
    labels = {labels_of: read.batch["text"]}
    read = read._replace(batch={**read.batch, **labels})
    module, own, image = decoder(read), params["decoder"], read.features["tokens_img"]
    size = module.length
    # The first step writes over what this token leaves in the cache.
    first = jnp.zeros((len(image), 1), jnp.int32)
    memory, cache = begin(module, own, first, image, None, Places(jnp.asarray(0), size))

    def step(before: jax.Array, position: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
      args = before[:, None], image, None, Places(position, size)
      hidden, cache = read_on(module, own, (memory, cache), *args)
      return logits_of(hidden[:, 0], params), cache

    return Writing(step, cache)

  fields = frozenset(locations.NAMES if tasks else ())
  prompt = locations.BEGINNINGS[0] if tasks else ""
  head = Head(init, apply_head, fields=fields, draw=draw, sums=SUMS, write=write, prompt=prompt)
  return Loss(frozenset(), lambda sizes: ({}, {}), mean_and_accuracy, pair=False, head=head)


SUMS = frozenset({"correct"})  # of `counted`


def logits_of(state: jax.Array, params: Mapping[str, Any]) -> jax.Array:
  """[b, D] -> [b, V] in float32, with the kernel of a head's logits."""
  wide = jnp.promote_types(state.dtype, jnp.float32)
  logits: jax.Array = state.astype(wide) @ params["logits"]["kernel"].astype(wide)
  return logits


def vocabulary(read: Read, where: str) -> int:
  """V, the number of token ids; ValueError for texts that are stored vectors."""
  words = int(read.sizes["vocabulary"])
  if not words or not jnp.issubdtype(read.batch["text"].dtype, jnp.integer):
    raise ValueError(
      f"{where} predicts the tokens of texts, and config.model.text takes stored vectors; use a"
      " text tower with a tokenizer (it need not be trained: config.frozen='model/text')"
    )
  return words


def counted(
  hidden: jax.Array,
  kernel: jax.Array,
  labels: jax.Array,
  mask: jax.Array,
  label_smoothing: float = 0.0,
) -> dict[str, jax.Array]:
  """The features of a head that predicts tokens: "sum" and "count" [b], "correct" [].

  Args:
    hidden: [b, L, D], states.
    kernel: [D, V].
    labels: [b, L] int32.
    mask: [b, L] bool, which labels count.
    label_smoothing: as of token_losses.
  """
  losses = token_losses(hidden, kernel, labels, label_smoothing=label_smoothing)
  return {
    "sum": jnp.where(mask, losses.nll, 0).sum(1),
    "count": mask.sum(1),
    "correct": (mask & losses.correct).sum(dtype=jnp.float32),
  }


def mean_and_accuracy(
  params: Params, state: State, feats: Features, batch: Any, context: Context
) -> tuple[jax.Array, Any]:
  """The mean loss of all tokens of the batch that count, and the share of correct ones."""
  value = mean_over_batch(feats)
  accuracy = feats["correct"] / jnp.maximum(feats["count"].sum(), 1)
  return value, (state, {"loss": value, "accuracy": accuracy})
