"""Projectors from a tower's output to the shared embedding space.

Each takes a TowerOutput of B rows, D wide, and returns [B, E]. `train` turns dropout on.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigalign import checks
from bigalign.towers.base import DTYPES, Attention, TowerOutput, masked_mean
from bigalign.towers.base import Mlp as TowerMlp
from bigalign.towers.linear import Dense


class Projector(nn.Module):
  """What projectors share: their options are checked before anything is computed."""

  def __post_init__(self) -> None:
    where = f"config.model: projector {type(self).__name__}"
    for name in ("hidden", "ratio", "depth"):
      if getattr(self, name, None) is not None:
        checks.between(where, 1, **{name: getattr(self, name)})
    for name in ("dropout", "hidden_dropout", "drop_path"):
      checks.below_one(where, **{name: getattr(self, name, 0.0)})
    dtype = getattr(self, "dtype", "float32")
    if isinstance(dtype, str):
      checks.known(f"{where}.dtype", dtype, DTYPES)
    super().__post_init__()


class Linear(Projector):
  """One linear map of the pooled vector.

  >>> import jax
  >>> out = TowerOutput(pooled=jnp.ones((2, 8)), tokens=jnp.ones((2, 3, 8)))
  >>> embeddings, parameters = Linear(dim=4).init_with_output(jax.random.key(0), out)
  >>> embeddings.shape
  (2, 4)

  Args:
    dim: E, the width of the embeddings.
    bias: whether the map has a bias (CLIP: no; the text side of SigLIP: yes).
    dtype: dtype of the computation.
  """

  dim: int
  bias: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(self, out: TowerOutput, train: bool = False) -> jax.Array:
    """-> [B, E]."""
    return Dense(self.dim, use_bias=self.bias, dtype=self.dtype, name="out")(_pooled(out))


class Mlp(Projector):
  """A linear map, GELU and another linear map of the pooled vector.

  >>> import jax
  >>> out = TowerOutput(pooled=jnp.ones((2, 8)), tokens=jnp.ones((2, 3, 8)))
  >>> embeddings, parameters = Mlp(dim=4).init_with_output(jax.random.key(0), out)
  >>> parameters["params"]["fc1"]["kernel"].shape  # (D + E) // 2 hidden units
  (8, 6)

  Args:
    dim: E, the width of the embeddings.
    hidden: number of hidden units; None: (D + E) // 2.
    bias: whether the layers have a bias.
    out_bias: whether the second layer has a bias; None: as `bias`.
    dtype: dtype of the computation.
  """

  dim: int
  hidden: int | None = None
  bias: bool = False
  out_bias: bool | None = None
  dtype: str = "float32"

  @nn.compact
  def __call__(self, out: TowerOutput, train: bool = False) -> jax.Array:
    """-> [B, E]."""
    x = _pooled(out)
    hidden = self.hidden or (x.shape[-1] + self.dim) // 2
    x = Dense(hidden, use_bias=self.bias, dtype=self.dtype, name="fc1")(x)
    x = nn.gelu(x, approximate=False)
    out_bias = self.bias if self.out_bias is None else self.out_bias
    return Dense(self.dim, use_bias=out_bias, dtype=self.dtype, name="fc2")(x)


class MlpNorm(Projector):
  """FLAME's image side, https://arxiv.org/abs/2411.11927: Linear, GELU, Linear, LayerNorm.

  >>> import jax
  >>> out = TowerOutput(pooled=jnp.ones((2, 8)), tokens=jnp.ones((2, 3, 8)))
  >>> embeddings, parameters = MlpNorm(dim=4).init_with_output(jax.random.key(0), out)
  >>> embeddings.shape, sorted(parameters["params"])
  ((2, 4), ['fc1', 'fc2', 'ln'])

  Args:
    dim: E, the width of the embeddings.
    hidden: number of hidden units; None: E.
    dtype: dtype of the computation.
  """

  dim: int
  hidden: int | None = None
  dtype: str = "float32"

  @nn.compact
  def __call__(self, out: TowerOutput, train: bool = False) -> jax.Array:
    """-> [B, E]."""
    x = Dense(self.hidden or self.dim, dtype=self.dtype, name="fc1")(_pooled(out))
    x = Dense(self.dim, dtype=self.dtype, name="fc2")(nn.gelu(x, approximate=False))
    embeddings: jax.Array = nn.LayerNorm(epsilon=1e-5, name="ln")(x)
    return embeddings


class Identity(Projector):
  """The pooled vector itself.

  >>> out = TowerOutput(pooled=jnp.ones((2, 8)), tokens=jnp.ones((2, 3, 8)))
  >>> Identity(dim=8).apply({}, out).shape
  (2, 8)

  Args:
    dim: E, the width of the embeddings, which must be the tower's width.
  """

  dim: int

  @nn.compact
  def __call__(self, out: TowerOutput, train: bool = False) -> jax.Array:
    """-> [B, E].

    Raises:
      ValueError: if the tower has another width.
    """
    x = _pooled(out)
    if x.shape[-1] != self.dim:
      raise ValueError(
        f"projector 'identity': the tower is {x.shape[-1]} wide, config.model.embed_dim is"
        f" {self.dim}; use 'linear' or make them equal"
      )
    return x


class Gated(Projector):
  """SAIL's alignment layer, https://arxiv.org/abs/2412.04616: W3 (ReLU6(a) c) + b3.

  a and c are linear maps, clipped to [-1000, 1000], of the LayerNorm of the pooled vector. The
  gate is ReLU6, as in the released code; the paper calls it GLU. With ratio 8 the layer has
  8 D (2 D + E + 2) + 2 D + E parameters.

  >>> import jax
  >>> out = TowerOutput(pooled=jnp.ones((2, 8)), tokens=jnp.ones((2, 3, 8)))
  >>> embeddings, parameters = Gated(dim=4).init_with_output(jax.random.key(0), out)
  >>> embeddings.shape, parameters["params"]["gate"]["kernel"].shape
  ((2, 4), (8, 64))

  Args:
    dim: E, the width of the embeddings.
    ratio: width of a and c per unit of D.
    dtype: dtype of the computation.
  """

  dim: int
  ratio: int = 8
  dtype: str = "float32"

  @nn.compact
  def __call__(self, out: TowerOutput, train: bool = False) -> jax.Array:
    """-> [B, E]."""
    x = nn.LayerNorm(epsilon=1e-5, name="ln")(_pooled(out))
    wide = self.ratio * x.shape[-1]

    def dense(name: str, features: int) -> nn.Dense:
      return Dense(
        features, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), name=name
      )

    gate, value = (jnp.clip(dense(name, wide)(x), -1e3, 1e3) for name in ("gate", "value"))
    return dense("out", self.dim)(nn.relu6(gate) * value)


class Residual(Projector):
  """The sum of a linear map and a small MLP of the pooled vector's LayerNorm.

  P(x) = A x + a + W2 GELU(W1 x + b1) + b2: E (D + 1) + H (D + 1) + E (H + 1) parameters and 2 D
  of the norm. freeze-align has this projector for tokens, https://arxiv.org/abs/2409.19425.

  >>> import jax
  >>> out = TowerOutput(pooled=jnp.ones((2, 8)), tokens=jnp.ones((2, 3, 8)))
  >>> embeddings, parameters = Residual(dim=4).init_with_output(jax.random.key(0), out)
  >>> embeddings.shape
  (2, 4)

  Args:
    dim: E, the width of the embeddings.
    hidden: H, the number of hidden units; None: E.
    dropout: rate of dropout on the normed input, in training.
    hidden_dropout: rate of dropout on the hidden units, in training.
    dtype: dtype of the computation.
  """

  dim: int
  hidden: int | None = None
  dropout: float = 0.1
  hidden_dropout: float = 0.0
  dtype: str = "float32"

  def __call__(self, out: TowerOutput, train: bool = False) -> jax.Array:
    """-> [B, E]."""
    return self.rows(_pooled(out), train)

  @nn.compact
  def rows(self, x: jax.Array, train: bool) -> jax.Array:
    """[..., D] -> [..., E]."""
    x = nn.LayerNorm(epsilon=1e-5, name="ln")(x)
    x = nn.Dropout(self.dropout, name="dropout")(x, not train)
    y = Dense(self.hidden or self.dim, dtype=self.dtype, name="fc1")(x)
    y = nn.Dropout(self.hidden_dropout, name="hidden_dropout")(
      nn.gelu(y, approximate=False), not train
    )
    y = Dense(self.dim, dtype=self.dtype, name="fc2")(y)
    return Dense(self.dim, dtype=self.dtype, name="skip")(x) + y


class PatchesAndClass(Projector):
  """freeze-align's image side, https://arxiv.org/abs/2409.19425.

  P_class(pooled) + the mean over tokens of P_patches(token), where the tower pools its class token.
  With an embedding store, the store must hold tokens: `bigalign embed --tokens`.

  >>> import jax
  >>> out = TowerOutput(pooled=jnp.ones((2, 8)), tokens=jnp.ones((2, 3, 8)))
  >>> embeddings, parameters = PatchesAndClass(dim=4).init_with_output(jax.random.key(0), out)
  >>> embeddings.shape, sorted(parameters["params"])
  ((2, 4), ['class', 'patches'])

  Args:
    dim: E, the width of the embeddings.
    hidden: hidden units of both projectors; None: E.
    dropout: rate of dropout on the normed inputs, in training.
    dtype: dtype of the computation.
  """

  dim: int
  hidden: int | None = None
  dropout: float = 0.1
  dtype: str = "float32"

  @nn.compact
  def __call__(self, out: TowerOutput, train: bool = False) -> jax.Array:
    """-> [B, E]."""
    options: dict[str, Any] = dict(
      dim=self.dim, hidden=self.hidden, dropout=self.dropout, dtype=self.dtype
    )
    tokens = Residual(**options, name="patches").rows(_tokens(out), train)
    pooled: jax.Array = Residual(**options, name="class")(out, train)
    return pooled + masked_mean(tokens, out.mask)


class Tokens(Projector):
  """freeze-align's text side, https://arxiv.org/abs/2409.19425.

  M(the mean over real tokens of P(token)), where M(x) = LayerNorm(p + dropout(U GELU(p) + c)) with
  p = W x + b.

  >>> import jax
  >>> out = TowerOutput(pooled=jnp.ones((2, 8)), tokens=jnp.ones((2, 3, 8)))
  >>> embeddings, parameters = Tokens(dim=4).init_with_output(jax.random.key(0), out)
  >>> embeddings.shape, sorted(parameters["params"])
  ((2, 4), ['fc1', 'fc2', 'ln', 'tokens'])

  Args:
    dim: E, the width of the embeddings.
    hidden: hidden units of P; None: E.
    dropout: rate of dropout in P and M, in training.
    dtype: dtype of the computation.
  """

  dim: int
  hidden: int | None = None
  dropout: float = 0.1
  dtype: str = "float32"

  @nn.compact
  def __call__(self, out: TowerOutput, train: bool = False) -> jax.Array:
    """-> [B, E]."""
    tokens = Residual(self.dim, self.hidden, self.dropout, dtype=self.dtype, name="tokens").rows(
      _tokens(out), train
    )
    p = Dense(self.dim, dtype=self.dtype, name="fc1")(masked_mean(tokens, out.mask))
    y = Dense(self.dim, dtype=self.dtype, name="fc2")(nn.gelu(p, approximate=False))
    y = nn.Dropout(self.dropout, name="dropout")(y, not train)
    embeddings: jax.Array = nn.LayerNorm(epsilon=1e-5, name="ln")(p + y)
    return embeddings


class Layer(nn.Module):
  """A block of Blocks: attention and a SwiGLU MLP, both with LayerScale and drop path.

  Args:
    heads: of attention.
    hidden: units of the MLP.
    drop_path: probability that a row leaves out a branch, in training.
    dtype: dtype of the computation.
  """

  heads: int
  hidden: int
  drop_path: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
    """[B, N, D], mask [B, N] bool (True = attended to) -> [B, N, D]."""

    def norm(name: str) -> jax.Array:
      normed: jax.Array = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)(x)
      return normed

    def branch(name: str, y: jax.Array) -> jax.Array:
      scale = self.param(f"scale_{name}", nn.initializers.constant(1e-5), (y.shape[-1],))
      drop = nn.Dropout(self.drop_path, broadcast_dims=(1, 2), name=f"drop_{name}")
      kept: jax.Array = drop(y * scale.astype(y.dtype)[None, None], not train)
      return kept

    y = norm("ln1")
    x = x + branch("attn", Attention(self.heads, self.dtype, name="attn")(y, y, mask))
    mlp = TowerMlp(self.hidden, "silu", dtype=self.dtype, gated=True, name="mlp")
    return x + branch("mlp", mlp(norm("ln2")))


class Blocks(Projector):
  """dino.txt's image side, https://arxiv.org/abs/2412.16334: blocks on a frozen tower's tokens.

  The class token, which the tower pools (pool="cls" or "cls+mean"), and the patches go through
  pre-norm blocks with SwiGLU, LayerScale from 1e-5 and drop path, and a layer norm. The embedding
  is the class token and the mean of the patches, concatenated. As published, it is 2 D wide; of
  another width, each token first goes through a linear map without bias. Registers of the tower
  take no part here, and do in the release.

  >>> import jax
  >>> out = TowerOutput(pooled=jnp.ones((2, 8)), tokens=jnp.ones((2, 3, 8)))
  >>> embeddings, parameters = Blocks(dim=16, heads=2).init_with_output(jax.random.key(0), out)
  >>> embeddings.shape, sorted(parameters["params"])
  ((2, 16), ['block_0', 'block_1', 'ln'])

  Args:
    dim: E, the width of the embeddings, an even number.
    depth: number of blocks.
    heads: attention heads; None: D / 64, at least 1.
    drop_path: probability that a row leaves out a branch of a block, in training.
    dtype: dtype of the computation.
  """

  dim: int
  depth: int = 2
  heads: int | None = None
  drop_path: float = 0.3
  dtype: str = "float32"

  def __call__(self, out: TowerOutput, train: bool = False) -> jax.Array:
    """-> [B, E]."""
    x = self.rows(out, train)
    return jnp.concatenate([x[:, 0], masked_mean(x[:, 1:], out.mask)], -1)

  @nn.compact
  def rows(self, out: TowerOutput, train: bool = False) -> jax.Array:
    """-> [B, 1 + N, E / 2] float32: the class token and the patches.

    Raises:
      ValueError: for an odd E.
    """
    if self.dim % 2:
      raise ValueError(f"projector 'blocks': config.model.embed_dim={self.dim} must be even")
    patches = _tokens(out)
    width = patches.shape[-1]
    x = jnp.concatenate([_pooled(out)[:, None, :width], patches], 1).astype(self.dtype)
    mask = None
    if out.mask is not None:
      mask = jnp.concatenate([jnp.ones_like(out.mask[:, :1]), out.mask], 1)
    heads = self.heads or max(1, width // 64)
    hidden = -(-8 * width // (3 * 64)) * 64  # two thirds of 4 D, in multiples of 64
    for i in range(self.depth):
      x = Layer(heads, hidden, self.drop_path, x.dtype, name=f"block_{i}")(x, mask, train)
    x = nn.LayerNorm(epsilon=1e-5, name="ln")(x)
    if self.dim != 2 * width:
      x = Dense(self.dim // 2, use_bias=False, dtype=self.dtype, name="out")(x)
    tokens: jax.Array = x.astype(jnp.float32)
    return tokens


def _pooled(out: TowerOutput) -> jax.Array:
  """[B, D] float32."""
  return out.pooled.astype(jnp.float32)


def _tokens(out: TowerOutput) -> jax.Array:
  """[B, N, D] float32.

  Raises:
    ValueError: if the output comes from a store without tokens.
  """
  if not out.tokens.shape[1]:
    raise ValueError(
      "this projector reads tokens, and config.data.stores holds pooled vectors: choose another,"
      " embed with --tokens, or train with the tower instead of a store"
    )
  return out.tokens.astype(jnp.float32)


READ_TOKENS = (Blocks, PatchesAndClass, Tokens)
PROJECTORS = dict(
  linear=Linear,
  mlp=Mlp,
  mlp_norm=MlpNorm,
  identity=Identity,
  gated=Gated,
  residual=Residual,
  patches_and_class=PatchesAndClass,
  tokens=Tokens,
  blocks=Blocks,
)
