"""Text transformer, pre-norm: bidirectional as in SigLIP, or causal as in CLIP."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigalign import checks, sharding
from bigalign.towers import base
from bigalign.towers.linear import lookup
from bigalign.towers.padding import all_positions, real_lengths

WEIGHT_INITS = ("clip", "big_vision")
POOLS = ("last", "eos", "argmax", "map", "mean", "class")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions(base.TransformerOptions):
  """The options of a text transformer.

  Args:
    vocab_size: rows of the token table; at least the tokenizer's vocabulary.
    length: longest text in tokens.
    pool: "last" (the last position, whatever its token: SigLIP), "eos" (the first token `eos`, or
      without one the last token that is not padding: CLIP), "argmax" (the highest id: open_clip),
      "map" (attention pooling), "mean", or "class" (CoCa: a learned token after all others; the
      last layer norm is applied to it alone, and the other tokens are returned without).
    eos: id of the token that pool="eos" reads.
    causal: whether a token attends only to the tokens before it and to itself (CLIP).
    mask_padding: whether padding is hidden from attention and pooling. SigLIP attends to it.
    shifted_mask: with pool="class", whether the mask of padding is one place too far right, as in
      all of open_clip's released weights: the first token of padding is attended to.
    weight_init: random first values of a tower of width D with n blocks. "clip": normal, with
      standard deviations 0.02 for the token table, 0.01 for the positions, D^-0.5 for queries, keys
      and values, (2 D)^-0.5 for the first layer of an MLP, (2 n D)^-0.5 for the last map of
      attention and MLP. "big_vision", for SigLIP and LiT: D^-0.5 for table and positions, Xavier's
      uniform numbers for kernels.

  Raises:
    ValueError: for an unknown name, with the known ones.
  """

  place: ClassVar[str] = "config.model.text"

  vocab_size: int
  length: int
  pool: str = "last"
  eos: int | None = None
  causal: bool = False
  mask_padding: bool = True
  shifted_mask: bool = False
  weight_init: str = "clip"

  def __post_init__(self) -> None:
    """Checks the values."""
    checks.known(f"{self.place}.pool", self.pool, POOLS)
    checks.known(f"{self.place}.weight_init", self.weight_init, WEIGHT_INITS)
    super().__post_init__()

  def build(self) -> Text:
    """The tower with these options."""
    return Text(self)

  def used_lengths(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[N]: how many leading positions of each text, [N, L], its embedding depends on."""
    reads_all = self.pool == "last" or (not self.mask_padding and self.pool in ("map", "mean"))
    if reads_all or not (self.mask_padding or self.causal):
      return all_positions(ids, mask)
    lengths = real_lengths(mask)
    if self.pool == "class" and self.shifted_mask:
      lengths = np.minimum(lengths + 1, mask.shape[1])
    if self.pool == "argmax":  # it may find padding, which then has to stay
      lengths = np.maximum(lengths, 1 + np.argmax(ids, 1))
    elif self.pool == "eos" and self.eos is not None:
      lengths = np.maximum(lengths, 1 + np.argmax(ids == self.eos, 1))
    return lengths


class Text(nn.Module):
  """Pre-norm text transformer.

  >>> import jax
  >>> tower = TextOptions(vocab_size=10, length=6, width=16, depth=1, heads=2).build()
  >>> ids = jax.numpy.zeros((2, 6), int)
  >>> output, parameters = tower.init_with_output(jax.random.key(0), ids)
  >>> output.pooled.shape, output.tokens.shape
  ((2, 16), (2, 6, 16))

  Args:
    options: see TextOptions.
  """

  options: TextOptions

  @nn.compact
  def __call__(
    self,
    ids: jax.Array,
    mask: jax.Array | None = None,
    train: bool = False,
    places: base.Places | None = None,
  ) -> base.TowerOutput:
    """Embeds texts, which may be shorter than `length`. Random key in training: "dropout".

    Args:
      ids: [B, L] int32, token ids.
      mask: [B, L] bool, True = no padding, which follows all other tokens as tokenizers write it
        (see Encoder); None: no token is padding.
      train: whether dropout is on.
      places: of the tokens, of which earlier calls have read those before: keys and values are kept
        in the collection "cache". The pooled vector is then that of the last token.

    Returns:
      pooled [B, D], tokens [B, L, D], and the mask.

    Raises:
      ValueError: for texts longer than `length`, and for `places` of a tower that does not read its
        tokens one after the other.
    """
    options, dtype = self.options, self.options.compute_dtype
    width, length = options.sizes.width, ids.shape[1]
    if length > options.length:
      raise ValueError(f"texts of {length} tokens; {options.place}.length is {options.length}")
    of_tokens = of_positions = 1 / width**0.5
    spreads = None
    if options.weight_init == "clip":
      of_tokens, of_positions, spreads = 0.02, 0.01, base.Spreads.clip(options.sizes)
    normal = nn.initializers.normal
    table = self.param("embedding", normal(of_tokens), (options.vocab_size, width))
    by_class = options.pool == "class"
    rows = options.length + by_class
    positions = self.param("positions", normal(of_positions), (1, rows, width)).astype(dtype)
    block = base.block_arguments(options, causal=options.causal, spreads=spreads)
    encoder = base.Encoder(options, block, norm=not by_class, name="encoder")
    if places is not None:
      if not (options.causal and by_class):
        raise ValueError(
          f"{options.place}: a text is read token by token with causal=True and pool='class', not"
          f" {options.causal} and {options.pool!r}"
        )
      own = jax.lax.dynamic_slice_in_dim(positions, places.first, length, 1)
      x = encoder(lookup(table, ids, dtype) + own, places=places)
      return base.TowerOutput(x[:, -1], x)
    x = lookup(table, ids, dtype) + positions[:, :length]
    seen = mask if options.mask_padding else None
    if by_class:
      token = self.param("class_token", normal(of_positions), (1, 1, width)).astype(dtype)
      token = token + positions[:, -1:]  # its position does not depend on the length of the text
      x = jnp.concatenate([x, jnp.broadcast_to(token, (len(x), 1, width))], 1)
      if seen is not None:
        seen = jnp.pad(
          seen, ((0, 0), (1, 0) if options.shifted_mask else (0, 1)), constant_values=True
        )
    x = nn.Dropout(options.dropout, name="dropout")(x, not train)
    at_end = not by_class or options.shifted_mask
    x = encoder(sharding.constrain_batch(x), seen, train=train, padding_at_end=at_end)
    if by_class:
      norm = nn.LayerNorm(epsilon=options.epsilon, dtype=dtype, name="ln")
      return base.TowerOutput(norm(x[:, -1]), x[:, :-1], mask)
    if options.pool == "map":
      pooled = base.MapHead(options, name="map_head")(x, seen)
    elif options.pool == "mean":
      pooled = base.masked_mean(x, seen)
    else:
      last = self._last(ids, mask)
      pooled = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    return base.TowerOutput(pooled, x, mask)

  def _last(self, ids: jax.Array, mask: jax.Array | None) -> jax.Array:
    """[B] int32: the position of the token that represents the text."""
    pool, eos = self.options.pool, self.options.eos
    if pool == "argmax":
      return jnp.argmax(ids, 1)
    if pool == "eos" and eos is not None:
      return jnp.argmax(ids == eos, 1)
    if pool == "last" or mask is None:
      return jnp.full(ids.shape[:1], ids.shape[1] - 1)
    return jnp.maximum(mask.sum(1) - 1, 0)
