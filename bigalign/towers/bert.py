"""Post-norm text encoders: BERT https://arxiv.org/abs/1810.04805, RoBERTa, XLM-R, MPNet."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigalign import checks, sharding, sphere
from bigalign.towers import attention, base
from bigalign.towers.linear import Dense, lookup
from bigalign.towers.padding import real_lengths

POOLS = ("cls", "pooler", "mean")


def buckets(length: int, count: int, farthest: int = 128) -> np.ndarray:
  """T5's buckets of the distance from each query to each key, https://arxiv.org/abs/1910.10683.

  Half of the buckets are for keys after the query. Half of each half hold a single distance; the
  others grow as the logarithm.

  Args:
    length: L, tokens of a text.
    count: number of buckets.
    farthest: distance in tokens from which all keys are in the last bucket.

  Returns:
    [L, L] int32, [query, key].
  """
  distance = np.arange(length)[None] - np.arange(length)[:, None]  # key - query
  half = count // 2
  exact = half // 2
  far = np.maximum(np.abs(distance), 1).astype(np.float32)
  # In float32, as the models were trained: whole logarithms must be rounded to the same side.
  log = np.log(far / np.float32(exact)) / np.float32(np.log(farthest / exact))
  grown = np.minimum(exact + (log * np.float32(half - exact)).astype(np.int64), half - 1)
  near = np.where(np.abs(distance) < exact, np.abs(distance), grown)
  return np.asarray(near + half * (distance > 0), np.int32)


class Block(nn.Module):
  """Post-norm transformer block."""

  heads: int
  hidden: int
  activation: str = "gelu"
  dropout: float = 0.0
  epsilon: float = 1e-12
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    mask: attention.Mask = None,
    deterministic: bool = True,
    bias: jax.Array | None = None,
  ) -> tuple[jax.Array, None]:
    """[B, N, D] -> ([B, N, D], None); bias [1, H, N, N] is added to the logits of attention."""
    norm = {"epsilon": self.epsilon, "dtype": self.dtype}
    y = base.Attention(self.heads, self.dtype, name="attn")(x, x, mask, bias=bias)
    y = nn.Dropout(self.dropout, name="attn_dropout")(y, deterministic)
    x = nn.LayerNorm(name="ln1", **norm)(x + y)
    y = base.Mlp(self.hidden, self.activation, dtype=self.dtype, name="mlp")(x, deterministic)
    y = nn.Dropout(self.dropout, name="mlp_dropout")(y, deterministic)
    return sharding.constrain_batch(nn.LayerNorm(name="ln2", **norm)(x + y)), None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertOptions(base.TransformerOptions):
  """The options of a text encoder of BERT's kind.

  Args:
    vocab_size: rows of the token table; at least the tokenizer's vocabulary.
    length: longest text in tokens.
    types: rows of the table of token types; 0: no table (MPNet).
    pad: id of the padding token, for texts without a mask.
    skip_padding: whether positions count only real tokens, from pad + 1 on, and padding has the
      position `pad` (RoBERTa).
    buckets: buckets of the distance between tokens, each with a bias of attention that all blocks
      share (MPNet: 32); 0: no such bias.
    pool: "mean" over the mask, "cls" (the first token) or "pooler" (tanh of a linear map of the
      first token).
    unit: whether the pooled vector has length 1 (the last module of most sentence-transformers).

  Raises:
    ValueError: for an unknown name, with the known ones.
  """

  place: ClassVar[str] = "config.model.text"

  vocab_size: int
  length: int
  types: int = 2
  pad: int = 0
  skip_padding: bool = False
  buckets: int = 0
  pool: str = "mean"
  unit: bool = False
  activation: str = "gelu"
  epsilon: float = 1e-12

  def __post_init__(self) -> None:
    """Checks the values."""
    checks.known(f"{self.place}.pool", self.pool, POOLS)
    super().__post_init__()

  def build(self) -> Bert:
    """The tower with these options."""
    return Bert(self)

  def used_lengths(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[N]: how many leading positions of each text, [N, L], its embedding depends on."""
    return real_lengths(mask)


class Bert(nn.Module):
  """Post-norm text encoder: BERT, RoBERTa, XLM-R, MPNet.

  >>> import jax
  >>> tower = BertOptions(vocab_size=10, length=6, width=16, depth=1, heads=2).build()
  >>> ids = jax.numpy.ones((2, 4), int)
  >>> output, parameters = tower.init_with_output(jax.random.key(0), ids)
  >>> output.pooled.shape, output.tokens.shape
  ((2, 16), (2, 4, 16))

  Args:
    options: see BertOptions.
  """

  options: BertOptions

  @nn.compact
  def __call__(
    self,
    ids: jax.Array,
    mask: jax.Array | None = None,
    train: bool = False,
    types: jax.Array | None = None,
  ) -> base.TowerOutput:
    """Embeds texts, which may be shorter than `length`. Random key in training: "dropout".

    Args:
      ids: [B, L] int32, token ids.
      mask: [B, L] bool, True = no padding, which follows all other tokens as tokenizers write it
        (see Encoder); None: the tokens `pad` are padding.
      train: whether dropout is on.
      types: [B, L] int32, token types; None: all are of type 0.

    Returns:
      pooled [B, D], tokens [B, L, D], and the mask.

    Raises:
      ValueError: for texts longer than `length`.
    """
    options, dtype = self.options, self.options.compute_dtype
    length = ids.shape[1]
    if length > options.length:
      raise ValueError(f"texts of {length} tokens; {options.place}.length is {options.length}")
    padding_at_end = mask is not None  # a token `pad` may also be in the middle of a text
    mask = ids != options.pad if mask is None else mask.astype(bool)
    x = lookup(self._table("embedding", options.vocab_size), ids, dtype) + self._positions(ids)
    if options.types:
      table = self._table("types", options.types)
      x = x + (self._first(table, 1) if types is None else lookup(table, types, dtype))
    x = nn.LayerNorm(epsilon=options.epsilon, dtype=dtype, name="ln_embedding")(x)
    x = nn.Dropout(options.dropout, name="dropout")(x, not train)
    block = base.block_arguments(options)
    x = base.Encoder(options, block, kind=Block, norm=False, name="encoder")(
      sharding.constrain_batch(x), mask, train, self._distances(length), padding_at_end
    )
    return base.TowerOutput(self._pooled(x, mask), x, mask)

  def _table(self, name: str, rows: int) -> jax.Array:
    """[rows, D]: a learned table."""
    return self.param(name, nn.initializers.normal(0.02), (rows, self.options.sizes.width))

  def _first(self, table: jax.Array, rows: int) -> jax.Array:
    """[1, rows, D]: the first rows of a table."""
    return sharding.replicate(table.astype(self.options.compute_dtype))[None, :rows]

  def _positions(self, ids: jax.Array) -> jax.Array:
    """[B, L, D] or [1, L, D]; with skip_padding the first token has the position pad + 1."""
    options = self.options
    skipped = options.pad + 1 if options.skip_padding else 0
    table = self._table("positions", options.length + skipped)
    if not options.skip_padding:
      return self._first(table, ids.shape[1])
    real = ids != options.pad
    return lookup(table, jnp.cumsum(real, 1) * real + options.pad, options.compute_dtype)

  def _distances(self, length: int) -> jax.Array | None:
    """[1, H, L, L], added to the logits of attention in every block."""
    options = self.options
    if not options.buckets:
      return None
    table = self.param(
      "relative", nn.initializers.normal(0.02), (options.buckets, options.sizes.heads)
    )
    # Indexed before the cast, so that the gradient of the table is float32.
    bias = table[buckets(length, options.buckets)].astype(options.compute_dtype)
    return jnp.moveaxis(bias, -1, 0)[None]

  def _pooled(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, L, D] -> [B, D]."""
    options = self.options
    if options.pool == "mean":
      pooled = base.masked_mean(x, mask)
    elif options.pool == "cls":
      pooled = x[:, 0]
    else:
      dtype = options.compute_dtype
      pooled = jnp.tanh(Dense(options.sizes.width, dtype=dtype, name="pooler")(x[:, 0]))
    return sphere.unit(pooled.astype(jnp.float32)) if options.unit else pooled
