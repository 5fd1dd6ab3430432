"""What the towers share: options, transformer blocks, an encoder with scan and remat, pooling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import einops
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from bigalign import checks, sharding
from bigalign.towers import attention
from bigalign.towers.attention import Device
from bigalign.towers.linear import Dense, DenseGeneral

# name: (width, depth, heads, hidden units per width). ViT and scaling-ViT sizes,
# https://arxiv.org/abs/2010.11929, 2106.04560; So400m https://arxiv.org/abs/2305.13035.
VARIANTS: dict[str, tuple[int, int, int, float]] = {
  "Ti": (192, 12, 3, 4.0),
  "S": (384, 12, 6, 4.0),
  "M": (512, 12, 8, 4.0),
  "B": (768, 12, 12, 4.0),
  "L": (1024, 24, 16, 4.0),
  "So400m": (1152, 27, 16, 4304 / 1152),
  "H": (1280, 32, 16, 4.0),
  "g": (1408, 40, 16, 6144 / 1408),
  "G": (1664, 48, 16, 8192 / 1664),
}


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU, https://arxiv.org/abs/1606.08415, for any [...].

  jax.nn.gelu computes it from erfc, which costs CPUs 5 % of a training step. From erf it has the
  same absolute error, in float32 or wider, whatever the dtype of x.
  """
  return _gelu_and_slope(x)[0]


def _gelu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """GELU and its derivative, in the dtype of x."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  probability = 0.5 + 0.5 * jax.lax.erf(wide * np.sqrt(0.5).astype(wide.dtype))
  density = jnp.exp(-0.5 * wide * wide) * (1 / np.sqrt(2 * np.pi)).astype(wide.dtype)
  return (wide * probability).astype(x.dtype), (probability + wide * density).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  y, slope = _gelu_and_slope(*primals)
  return y, slope * tangents[0]


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": gelu,
  "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
  "silu": nn.silu,
}

DTYPES = ("bfloat16", "float16", "float32", "float64")

REMAT: dict[str, Any] = {  # name: checkpoint policy of each block
  "none": None,  # keep every activation
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep the matmuls of weights
  "attention": jax.checkpoint_policies.save_only_these_names(
    "attention"
  ),  # keep those of Attention
  "full": jax.checkpoint_policies.nothing_saveable,  # keep the input of each layer
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerOptions:
  """The options that all towers share.

  Args:
    remat: activations kept for the backward pass: "none" keeps all, "dots" keeps the matmuls of
      weights, "attention" keeps those of attention but not the larger ones of the MLP, "full" keeps
      the input of each block. The others are computed again.
    dtype: dtype of the computation; parameters are float32.

  Raises:
    ValueError: for an unknown name, with the known ones.
  """

  place: ClassVar[str]  # of these options in the config, for error messages

  remat: str = "none"
  dtype: str = "bfloat16"

  def __post_init__(self) -> None:
    """Checks the values."""
    checks.known(f"{self.place}.remat", self.remat, REMAT)
    checks.known(f"{self.place}.dtype", self.dtype, DTYPES)

  @property
  def compute_dtype(self) -> Any:
    """`dtype` as a numpy dtype."""
    return jnp.dtype(self.dtype)


class Sizes(NamedTuple):
  """The sizes of a transformer: width D, layers, attention heads, hidden units of the MLP."""

  width: int
  depth: int
  heads: int
  hidden: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerOptions(TowerOptions):
  """The options that all transformer towers share.

  Args:
    variant: Ti, S, M, B, L, So400m, H, g or G: a named width, depth, number of heads and MLP
      ratio. Each of the four can be overridden.
    width: width of the tokens; None: the variant's.
    depth: number of blocks; None: the variant's.
    heads: attention heads, which must divide the width; None: the variant's.
    mlp_ratio: hidden units of the MLP per unit of width; None: the variant's.
    dropout: rate of dropout on the embedding and on both branches of each block, in training.
    activation: activation of the MLP: "gelu", "gelu_tanh", "quick_gelu" or "silu".
    epsilon: epsilon of every layer norm.
    scan: compile one program for all blocks and stack their parameters; False gives each block
      its own parameters.
    attention: "xla" (separate products), "cudnn" (a fused kernel on NVIDIA GPUs since Ampere, for
      bfloat16 and float16), "tpu" (a fused kernel for up to about 600 tokens on TPUs), or "auto":
      the fused kernel where it can compute this tower, otherwise XLA's. None is "xla".

  Raises:
    ValueError: for an unknown name, with the known ones, or for heads that do not divide the width.
  """

  variant: str = "B"
  width: int | None = None
  depth: int | None = None
  heads: int | None = None
  mlp_ratio: float | None = None
  dropout: float = 0.0
  activation: str = "gelu_tanh"
  epsilon: float = 1e-6
  scan: bool = True
  attention: str | None = "auto"

  def __post_init__(self) -> None:
    """Checks the values."""
    checks.known(f"{self.place}.activation", self.activation, ACTIVATIONS)
    checks.known(f"{self.place}.attention", self.attention or "xla", attention.IMPLEMENTATIONS)
    super().__post_init__()
    width, _, heads, _ = self.sizes
    if width % heads:
      raise ValueError(f"width {width} does not divide into {heads} heads; set heads or the width")

  @property
  def sizes(self) -> Sizes:
    """The sizes of the variant, with the overrides."""
    width, depth, heads, ratio = checks.choose(VARIANTS, self.variant, "variant")
    width = self.width or width
    hidden = round(width * (self.mlp_ratio or ratio))
    return Sizes(width, self.depth or depth, self.heads or heads, hidden)

  def attention_on(
    self, device: Device, tokens: int = 1, mask: str = "none", bias: bool = False
  ) -> str:
    """The implementation of attention on a device: see attention.choose."""
    width, _, heads, _ = self.sizes
    return attention.choose(
      self.attention,
      device,
      dtype=self.compute_dtype,
      tokens=tokens,
      heads=heads,
      head=width // heads,
      mask=mask,
      bias=bias,
    )

  @property
  def token_width(self) -> int:
    """D, the width of the tower's tokens."""
    return self.sizes.width


class Spreads(NamedTuple):
  """Standard deviations of the first kernels of a block: normal numbers, as in CLIP's text tower.

  qkv: of the queries, keys and values. branch: of the last map of both branches, smaller in deep
  towers. hidden: of the first layer of the MLP.
  """

  qkv: float
  branch: float
  hidden: float

  @classmethod
  def clip(cls, sizes: Sizes) -> Spreads:
    """https://arxiv.org/abs/2103.00020, for all widths and depths."""
    width, depth = sizes.width, sizes.depth
    return cls(width**-0.5, (2 * depth * width) ** -0.5, (2 * width) ** -0.5)


def _kernel(spread: float | None) -> nn.initializers.Initializer:
  """The first value of a kernel: normal numbers, or as in ViT, https://arxiv.org/abs/2010.11929."""
  return nn.initializers.xavier_uniform() if spread is None else nn.initializers.normal(spread)


def block_arguments(options: TransformerOptions, **others: Any) -> flax.core.FrozenDict[str, Any]:
  """Arguments of a block: those that follow from the shared options, and `others`."""
  return flax.core.FrozenDict(
    heads=options.sizes.heads,
    hidden=options.sizes.hidden,
    activation=options.activation,
    dropout=options.dropout,
    epsilon=options.epsilon,
    dtype=options.compute_dtype,
    **others,
  )


class TowerOutput(NamedTuple):
  """The output of a tower.

  Args:
    pooled: [B, D], or [B, 2 D] with pool="cls+mean".
    tokens: [B, N, D], after the last layer norm.
    mask: [B, N] bool, True = no padding; None where no token is padding.
    others: [B, K - 1, D], of K class tokens those after the first, which is `pooled`; None: K is 1.
  """

  pooled: jax.Array
  tokens: jax.Array
  mask: jax.Array | None = None
  others: jax.Array | None = None


def rotate(x: jax.Array, rotation: jax.Array) -> jax.Array:
  """Rotary position embedding of x [B, N, H, K], halves rotated; rotation [2, N, K]: cos, sin."""
  cos, sin = rotation[:, None, :, None, :]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated: jax.Array = x * cos + jnp.concatenate([-second, first], -1) * sin
  return rotated.astype(x.dtype)


@flax.struct.dataclass
class Places:
  """The places of some tokens of a text that a transformer reads part by part.

  Layers keep the keys and values of all places in the collection "cache".

  Args:
    first: [] int32, the place of the first of these tokens; the others follow.
    size: how many places a text has.
    both: whether these tokens see each other in both directions; else each sees the tokens up to
      itself.
  """

  first: jax.Array
  size: int = flax.struct.field(pytree_node=False)
  both: bool = flax.struct.field(pytree_node=False, default=False)

  def bias(self, count: int) -> jax.Array:
    """[1, 1, count, size]: hides from `count` tokens the places that they do not see."""
    own = jnp.full(count, count - 1) if self.both else jnp.arange(count)
    seen = jnp.arange(self.size)[None] <= (self.first + own)[:, None]
    return jnp.where(seen, 0.0, HIDDEN)[None, None]


HIDDEN = -1e9  # added to the logit of a token that is not seen


class Attention(nn.Module):
  """Multi-head attention.

  Args:
    heads: number of heads, which must divide the width.
    dtype: dtype of the computation.
    biases: which of the q(uery), k(ey), v(alue) and o(ut) maps have a bias.
    spreads: of the first kernels; None: Xavier's.
  """

  heads: int
  dtype: Any = jnp.float32
  biases: str = "qkvo"
  spreads: Spreads | None = None

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    memory: jax.Array,
    mask: attention.Mask = None,
    causal: bool = False,
    rotation: jax.Array | None = None,
    bias: jax.Array | None = None,
    places: Places | None = None,
    keep: bool = False,
  ) -> jax.Array:
    """[B, N, D] -> [B, N, D]: every token of x attends to the tokens of memory.

    Args:
      x: [B, N, D], the source of the queries.
      memory: [B, M, D], the source of keys and values.
      mask: [B, M] bool, True = attended to, or as of attention.prepare; None: all of memory.
      causal: whether token n attends only to the tokens up to n.
      rotation: [2, N, K], rotary embedding of queries and keys: cos, sin.
      bias: [1, H, N, M], added to the logits.
      places: of the tokens of x and memory, which are the same; they also attend to the tokens of
        earlier calls. Without rotation and bias.
      keep: whether keys and values of memory are those of the first call, which the collection
        "memory" holds.
    """
    width = x.shape[-1]

    def project(name: str, inputs: jax.Array) -> jax.Array:
      projected = DenseGeneral(
        (self.heads, width // self.heads),
        use_bias=name[0] in self.biases,
        dtype=self.dtype,
        kernel_init=_kernel(self.spreads and self.spreads.qkv),
        name=name,
      )(inputs)
      named: jax.Array = checkpoint_name(projected, "attention")  # for REMAT
      return named

    key: jax.Array
    value: jax.Array
    query = project("query", x)
    if keep and self.has_variable("memory", "keys"):
      key, value = (self.get_variable("memory", name) for name in ("keys", "values"))
    else:
      key, value = project("key", memory), project("value", memory)
      if keep:
        self.put_variable("memory", "keys", key)
        self.put_variable("memory", "values", value)
    if places is not None:
      key, value = (
        self._of_all_places(places, name, x) for name, x in (("keys", key), ("values", value))
      )
      causal, bias = False, places.bias(x.shape[1])
    if rotation is not None:
      query, key = rotate(query, rotation), rotate(key, rotation)
    y = attention.attend(query, key, value, mask, causal=causal, bias=bias)
    y = DenseGeneral(
      width,
      axis=(-2, -1),
      use_bias="o" in self.biases,
      dtype=self.dtype,
      kernel_init=_kernel(self.spreads and self.spreads.branch),
      name="out",
    )(y)
    named: jax.Array = checkpoint_name(y, "attention")
    return named

  def _of_all_places(self, places: Places, name: str, x: jax.Array) -> jax.Array:
    """[B, size, H, K]: x [B, N, H, K] at its places, and what earlier calls have put elsewhere."""
    shape = (x.shape[0], places.size, *x.shape[2:])
    kept = self.variable("cache", name, jnp.zeros, shape, x.dtype)
    kept.value = jax.lax.dynamic_update_slice_in_dim(kept.value, x, places.first, 1)
    every: jax.Array = kept.value
    return every


class Mlp(nn.Module):
  """Two layers with an activation in between; `gated` as in https://arxiv.org/abs/2002.05202."""

  hidden: int
  activation: str = "gelu_tanh"
  dropout: float = 0.0
  dtype: Any = jnp.float32
  gated: bool = False
  bias: bool = True
  spreads: Spreads | None = None

  @nn.compact
  def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
    """[..., D] -> [..., D]."""
    kwargs: dict[str, Any] = dict(
      use_bias=self.bias,
      dtype=self.dtype,
      bias_init=nn.initializers.normal(1e-6),
    )
    first = dict(kernel_init=_kernel(self.spreads and self.spreads.hidden), **kwargs)
    y = Dense(self.hidden, name="fc1", **first)(x)
    act = ACTIVATIONS[self.activation]
    y = act(Dense(self.hidden, name="gate", **first)(x)) * y if self.gated else act(y)
    y = nn.Dropout(self.dropout, name="dropout")(y, deterministic)
    last = _kernel(self.spreads and self.spreads.branch)
    return Dense(x.shape[-1], name="fc2", kernel_init=last, **kwargs)(y)


class Block(nn.Module):
  """Pre-norm transformer block."""

  heads: int
  hidden: int
  activation: str = "gelu_tanh"
  dropout: float = 0.0
  epsilon: float = 1e-6
  causal: bool = False
  dtype: Any = jnp.float32
  biases: str = "qkvo"
  gated: bool = False
  mlp_bias: bool = True
  layer_scale: float | None = None
  spreads: Spreads | None = None

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    mask: attention.Mask = None,
    deterministic: bool = True,
    rotation: jax.Array | None = None,
    places: Places | None = None,
  ) -> tuple[jax.Array, None]:
    """[B, N, D] -> ([B, N, D], None); nn.scan expects a pair. See Attention for the arguments."""
    norm = {"epsilon": self.epsilon, "dtype": self.dtype}
    y = nn.LayerNorm(name="ln1", **norm)(x)
    y = Attention(self.heads, self.dtype, self.biases, self.spreads, name="attn")(
      y, y, mask, self.causal, rotation, places=places
    )
    x = x + nn.Dropout(self.dropout, name="attn_dropout")(self._scaled("scale1", y), deterministic)
    y = nn.LayerNorm(name="ln2", **norm)(x)
    y = Mlp(
      self.hidden,
      self.activation,
      self.dropout,
      self.dtype,
      self.gated,
      self.mlp_bias,
      self.spreads,
      name="mlp",
    )(y, deterministic)
    x = x + nn.Dropout(self.dropout, name="mlp_dropout")(self._scaled("scale2", y), deterministic)
    return sharding.constrain_batch(x), None

  def _scaled(self, name: str, y: jax.Array) -> jax.Array:
    """LayerScale, https://arxiv.org/abs/2103.17239."""
    if self.layer_scale is None:
      return y
    scale = self.param(name, nn.initializers.constant(self.layer_scale), (y.shape[-1],))
    return y * scale.astype(self.dtype)[None, None]


class Encoder(nn.Module):
  """A stack of blocks and a layer norm.

  With scan the blocks are one program and one stacked array per parameter, "blocks/…": compile
  time does not grow with depth. Without, each block has its own, "block_3/…", can be frozen or
  given its own learning rate, and runs about 1.15 times faster on CPUs.

  Args:
    options: depth, scan, remat, and the epsilon and dtype of the last norm.
    block: arguments of `kind`.
    kind: class of a block.
    norm: whether a layer norm follows the last block.
  """

  options: TransformerOptions
  block: Mapping[str, Any]
  kind: Any = Block
  norm: bool = True

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array | None = None,
    train: bool = False,
    relation: jax.Array | None = None,
    padding_at_end: bool = False,
    places: Places | None = None,
  ) -> jax.Array:
    """[B, N, D] -> [B, N, D], normed.

    Args:
      x: [B, N, D].
      mask: [B, N] bool, True = attended to.
      train: whether dropout is on.
      relation: relative positions, for every block: [2, N, K], a rotation, or [1, H, N, N], a bias
        of attention.
      padding_at_end: whether the caller knows that in each row of the mask the padding follows all
        other tokens. Only then may attention read their number instead of the mask.
      places: as of Attention, in causal blocks without mask and relation.
    """
    options, block = self.options, self.kind
    count, hidden = x.shape[1], "none" if mask is None else "end" if padding_at_end else "any"
    biased = relation is not None and relation.ndim == 4
    chosen = options.attention_on(attention.device(), count, hidden, biased)
    x, seen, relation = attention.prepare(chosen if places is None else "xla", x, mask, relation)
    last = () if places is None else (places,)  # other kinds of blocks do not take it
    policy = checks.choose(REMAT, options.remat, "remat")
    if policy is not None:
      # Inside a scan the compiler cannot undo the remat, and the guards against it cost fusions.
      block = nn.remat(block, policy=policy, prevent_cse=not options.scan, static_argnums=(3,))
    if options.scan:
      stack = nn.scan(
        block,
        variable_axes={"params": 0, "cache": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=options.sizes.depth,
      )
      x, _ = stack(name="blocks", **self.block)(x, seen, not train, relation, *last)
    else:
      for i in range(options.sizes.depth):
        x, _ = block(name=f"block_{i}", **self.block)(x, seen, not train, relation, *last)
    encoded: jax.Array = x[:, :count] if x.shape[1] > count else x
    if self.norm:
      norm = nn.LayerNorm(epsilon=options.epsilon, dtype=options.compute_dtype, name="ln")
      encoded = norm(encoded)
    return encoded


class MapHead(nn.Module):
  """Multi-head attention pooling: a learned query, then a residual MLP.

  Args:
    options: the sizes, activation, epsilon and dtype of its tower.
  """

  options: TransformerOptions

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """[B, N, D] -> [B, D]; mask [B, N] bool, True = attended to."""
    options, dtype = self.options, self.options.compute_dtype
    probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, x.shape[-1]))
    probe = jnp.broadcast_to(probe.astype(dtype), (x.shape[0], 1, x.shape[-1]))
    y = Attention(options.sizes.heads, dtype, name="attn")(probe, x, mask)
    z = nn.LayerNorm(epsilon=options.epsilon, dtype=dtype, name="ln")(y)
    y = y + Mlp(options.sizes.hidden, options.activation, dtype=dtype, name="mlp")(z)
    return einops.rearrange(y, "b 1 d -> b d")


def masked_mean(x: jax.Array, mask: jax.Array | None) -> jax.Array:
  """[B, N, D] -> [B, D], float32: the mean over the tokens where mask [B, N] is True."""
  x = x.astype(jnp.float32)
  if mask is None:
    return x.mean(1)
  w = mask.astype(jnp.float32)[..., None]
  return (x * w).sum(1) / jnp.maximum(w.sum(1), 1.0)
