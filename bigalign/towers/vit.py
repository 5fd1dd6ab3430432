"""Vision transformer, https://arxiv.org/abs/2010.11929."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigalign import checks, sharding
from bigalign.towers import base
from bigalign.towers.linear import Dense, product

POOLS = ("map", "cls", "pooler", "mean", "max", "cls+mean", "queries")
POSITIONS = ("learned", "sincos2d", "rope")


def sincos2d(rows: int, cols: int, width: int, temperature: float = 10_000.0) -> np.ndarray:
  """Fixed positions of a grid: sines and cosines of both coordinates, as in MoCo v3.

  Args:
    rows: rows of patches.
    cols: columns of patches.
    width: width of the tokens, which 4 must divide.
    temperature: longest wavelength, as a multiple of 2 pi patches.

  Returns:
    [rows * cols, width] float32.
  """
  if width % 4:
    raise ValueError(f"sincos2d positions need a width that 4 divides, not {width}")
  omega = 1.0 / temperature ** (np.arange(width // 4) / (width // 4 - 1))
  y, x = np.mgrid[:rows, :cols]
  angles = [np.outer(a.ravel(), omega) for a in (x, y)]
  return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1).astype(np.float32)


def rope(rows: int, cols: int, before: int, width: int, theta: float) -> np.ndarray:
  """Rotary position embedding of a grid of patches as in DINOv3, https://arxiv.org/abs/2508.10104.

  The coordinates of patch centres are in [-1, 1] on both axes, whatever the grid.

  Args:
    rows: rows of patches.
    cols: columns of patches.
    before: number of tokens before the patches; they are not rotated.
    width: width of a head, which 4 must divide.
    theta: inverse of the lowest frequency; the highest is 1.

  Returns:
    [2, before + rows * cols, width] float32: cosines and sines of the angles.
  """
  if width % 4:
    raise ValueError(f"positions='rope' needs heads of a width that 4 divides, not {width}")
  centers = [2 * (np.arange(n) + 0.5) / n - 1 for n in (rows, cols)]
  frequency = 2 * np.pi * theta ** -np.arange(0, 1, 4 / width)
  angles = np.stack(np.meshgrid(*centers, indexing="ij"), -1)[..., None] * frequency
  angles = np.tile(angles.reshape(rows * cols, -1), 2)
  angles = np.concatenate([np.zeros((before, width)), angles])
  return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def resampled(table: jax.Array, grid: tuple[int, int], to: tuple[int, int]) -> jax.Array:
  """Position embeddings of another grid of patches, linearly interpolated with antialiasing.

  FlexiViT does the same in every step, https://arxiv.org/abs/2212.08013.

  Args:
    table: [1, n, D], positions of the n patches of `grid`.
    grid: (rows, columns) of the table.
    to: (rows, columns) of the result.

  Returns:
    [1, m, D]; the table itself if the grids are equal.
  """
  if grid == to:
    return table
  square = einops.rearrange(table, "1 (y x) d -> y x d", y=grid[0])
  square = jax.image.resize(square, (*to, table.shape[-1]), "linear", antialias=True)
  positions: jax.Array = einops.rearrange(square, "y x d -> 1 (y x) d")
  return positions


class PatchEmbed(nn.Module):
  """A linear map of non-overlapping patches: a strided convolution, computed as a matmul."""

  patch: int
  width: int
  dtype: Any
  bias: bool = True

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H/p, W/p, D]."""
    p = self.patch
    kernel = self.param(
      "kernel",
      nn.initializers.lecun_normal(in_axis=(0, 1, 2)),
      (p, p, image.shape[-1], self.width),
    )
    patches = einops.rearrange(image, "b (h p) (w q) c -> b h w (p q c)", p=p, q=p)
    flat = einops.rearrange(kernel, "p q c d -> (p q c) d")
    x = product(patches.astype(self.dtype), flat, (((3,), (0,)), ((), ())))
    if not self.bias:
      return x
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    return x + bias.astype(self.dtype)[None, None, None]


class ConvStem(nn.Module):
  """3 x 3 convolutions of stride 2 down to the grid of patches, https://arxiv.org/abs/2106.14881."""

  patch: int
  width: int
  dtype: Any

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H/p, W/p, D]."""
    steps = self.patch.bit_length() - 1
    x = image.astype(self.dtype)
    for i in range(steps):
      features = self.width >> (steps - i)
      x = nn.Conv(features, (3, 3), (2, 2), dtype=self.dtype, name=f"conv_{i}")(x)
      x = nn.LayerNorm(dtype=self.dtype, name=f"ln_{i}")(x)
      x = nn.gelu(x)
    return Dense(self.width, dtype=self.dtype, name="out")(x)


STEMS = {"patch": PatchEmbed, "conv": ConvStem}


class Queries(nn.Module):
  """CoCa's attentional pooler: learned queries attend to all tokens; a layer norm follows."""

  options: VitOptions

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, N, D] -> [B, queries, query_width]."""
    options, dtype = self.options, self.options.compute_dtype
    width = options.token_width

    def norm(name: str, x: jax.Array) -> jax.Array:
      normed: jax.Array = nn.LayerNorm(epsilon=options.epsilon, dtype=dtype, name=name)(x)
      return normed

    queries = self.param("queries", nn.initializers.normal(1.0), (1, options.queries, width))
    read = norm("ln_queries", queries.astype(dtype))
    read = jnp.broadcast_to(read, (len(x), *read.shape[1:]))
    y = base.Attention(options.query_heads, dtype, name="attn")(read, norm("ln_tokens", x))
    return norm("ln", y)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitOptions(base.TransformerOptions):
  """The options of a vision transformer.

  Args:
    patch: pixels per side of a patch; must divide the image.
    stem: "patch" (one linear map of each patch) or "conv" (3 x 3 convolutions of stride 2; the
      patch must be a power of 2).
    patch_bias: whether the patch stem has a bias; CLIP's has none.
    pool: "map" (attention pooling, SigLIP), "cls" (the class token), "pooler" (tanh of a linear
      map of the class token), "mean" of the patches, "max" (their largest value in each place:
      CLIPpy, https://arxiv.org/abs/2210.09996), "cls+mean" (SAIL: both concatenated, 2 D wide) or
      "queries" (CoCa: learned queries attend to all tokens; the first one is pooled, and the others
      are the tokens of the image).
    queries: their number with pool="queries".
    query_width: their width with pool="queries"; None: that of the tokens.
    query_heads: heads of their attention.
    positions: "learned" (for one image size; stages of a run resample them), "sincos2d" (fixed) or
      "rope" (DINOv3).
    rope_theta: inverse of rope's lowest frequency; the highest is 1.
    class_token: whether the tower has a class token; None: if `pool` reads it.
    class_tokens: K, the number of class tokens; more than 1 only with pool="cls". The first one
      gives the embedding of the image. TIPS has 2, https://arxiv.org/abs/2410.16512; losses with
      texts="per_class_token" compare each with a text of its own.
    class_position: whether the class tokens have learned positions.
    registers: number of extra tokens without a position, https://arxiv.org/abs/2309.16588.
    patch_dropout: share of the patches left out in training, https://arxiv.org/abs/2212.00794.
    pre_norm: whether a layer norm precedes the first block (CLIP).
    biases: which of the q(uery), k(ey), v(alue) and o(ut) maps of attention have a bias.
    gated: whether the MLP is gated; SwiGLU with activation="silu".
    mlp_bias: whether the layers of the MLP have a bias.
    layer_scale: initial value of LayerScale, a factor per channel on each branch,
      https://arxiv.org/abs/2103.17239; None: without.

  Raises:
    ValueError: for an unknown name, with the known ones, or options that exclude each other.
  """

  place: ClassVar[str] = "config.model.image"

  patch: int = 16
  stem: str = "patch"
  patch_bias: bool = True
  pool: str = "map"
  queries: int = 256
  query_width: int | None = None
  query_heads: int = 8
  positions: str = "learned"
  rope_theta: float = 100.0
  class_token: bool | None = None
  class_tokens: int = 1
  class_position: bool = False
  registers: int = 0
  patch_dropout: float = 0.0
  pre_norm: bool = False
  biases: str = "qkvo"
  gated: bool = False
  mlp_bias: bool = True
  layer_scale: float | None = None

  def __post_init__(self) -> None:
    """Checks the values."""
    checks.known(f"{self.place}.stem", self.stem, STEMS)
    checks.known(f"{self.place}.pool", self.pool, POOLS)
    checks.known(f"{self.place}.positions", self.positions, POSITIONS)
    super().__post_init__()
    if self.stem == "conv" and (self.patch & (self.patch - 1) or not self.patch_bias):
      raise ValueError(f"{self.place}.patch={self.patch}: a conv stem needs a power of 2, and bias")
    if not self.has_class_token and (self._pool_reads_class_token or self.class_position):
      raise ValueError(
        f"{self.place}.class_token=False: pool={self.pool!r} or class_position needs it"
      )
    if self.class_tokens < 1 or (self.class_tokens > 1 and self.pool != "cls"):
      raise ValueError(
        f"{self.place}.class_tokens={self.class_tokens}: at least 1, and more only with pool='cls',"
        f" not pool={self.pool!r}"
      )
    if self.positions == "rope" and self.patch_dropout:
      raise ValueError(f"{self.place}.patch_dropout: not with positions='rope'")

  @property
  def _pool_reads_class_token(self) -> bool:
    return self.pool in ("cls", "pooler", "cls+mean")

  @property
  def has_class_token(self) -> bool:
    """`class_token`, resolved."""
    return self._pool_reads_class_token if self.class_token is None else self.class_token

  @property
  def token_width(self) -> int:
    """The width of the tower's tokens."""
    width = self.sizes.width
    return self.query_width or width if self.pool == "queries" else width

  @property
  def extra_tokens(self) -> int:
    """The number of tokens before the patches: class tokens and registers."""
    return self.has_class_token * self.class_tokens + self.registers

  def build(self) -> ViT:
    """The tower with these options."""
    return ViT(self)


class ViT(nn.Module):
  """Vision transformer, https://arxiv.org/abs/2010.11929.

  >>> import jax
  >>> tower = VitOptions(patch=8, width=16, depth=1, heads=2, pool="mean").build()
  >>> images = jax.numpy.zeros((2, 32, 16, 3))
  >>> output, parameters = tower.init_with_output(jax.random.key(0), images)
  >>> output.pooled.shape, output.tokens.shape
  ((2, 16), (2, 8, 16))

  Args:
    options: see VitOptions.
    grid: (rows, columns) of the learned positions; None: those of the image.
    drawn: (rows, columns) of the random initial positions, which are resampled to `grid`; None:
      `grid` itself.
  """

  options: VitOptions
  grid: tuple[int, int] | None = None
  drawn: tuple[int, int] | None = None

  @nn.compact
  def __call__(
    self,
    image: jax.Array,
    train: bool = False,
    hidden: tuple[jax.Array, jax.Array] | None = None,
    kept: jax.Array | None = None,
  ) -> base.TowerOutput:
    """Embeds images.

    Random keys in training: "dropout" for dropout, "patch_dropout" for patch dropout.

    Args:
      image: [B, H, W, 3], normalised.
      train: whether dropout and patch dropout are on.
      hidden: (places [B, N] bool, vector [D]): the vector replaces the embedding of these patches,
        before positions are added.
      kept: [B, n] int32, the patches that the blocks see, with their positions; None: all.

    Returns:
      pooled [B, D or 2 D], tokens [B, N or n, D] of the patches; of pool="queries" those of the
      queries; of several class tokens the others.

    Raises:
      ValueError: if the patch does not divide the image; for `kept` with positions="rope".
    """
    options, sizes, dtype = self.options, self.options.sizes, self.options.compute_dtype
    patch, extra = options.patch, options.extra_tokens
    _, height, width, _ = image.shape
    if height % patch or width % patch:
      raise ValueError(
        f"model.image.patch={patch} does not divide the image of {height} x {width} pixels"
      )
    bias = {} if options.patch_bias else {"bias": False}
    x = STEMS[options.stem](patch, sizes.width, dtype, name="embedding", **bias)(image)
    rows, cols = x.shape[1:3]
    x = einops.rearrange(x, "b h w d -> b (h w) d")
    if hidden is not None:
      places, vector = hidden
      x = jnp.where(places[..., None], vector.astype(dtype)[None, None], x)
    rotation = None
    if options.positions == "rope":
      rotation = jnp.asarray(
        rope(rows, cols, extra, sizes.width // sizes.heads, options.rope_theta)
      )
    else:
      x = x + self._positions(rows, cols).astype(dtype)
    if kept is not None:
      if rotation is not None:
        raise ValueError(
          f"{options.place}.positions='rope': a loss leaves patches out, which needs positions that"
          " are added to them: 'learned' or 'sincos2d'"
        )
      x = jnp.take_along_axis(x, kept[..., None], axis=1)
    if train and options.patch_dropout:
      x = self._keep_some(x)
    if extra:
      x = jnp.concatenate([self._extra_tokens(x), x], 1)
    if options.pre_norm:
      x = nn.LayerNorm(epsilon=options.epsilon, dtype=dtype, name="ln_pre")(x)
    x = nn.Dropout(options.dropout, name="dropout")(x, not train)
    block = base.block_arguments(
      options,
      biases=options.biases,
      gated=options.gated,
      mlp_bias=options.mlp_bias,
      layer_scale=options.layer_scale,
    )
    by_queries = options.pool == "queries"
    x = base.Encoder(options, block, norm=not by_queries, name="encoder")(
      sharding.constrain_batch(x), train=train, relation=rotation
    )
    if by_queries:
      x = Queries(options, name="pooler")(x)
      return base.TowerOutput(x[:, 0], x[:, 1:])
    patches, others = x[:, extra:], None
    if options.pool == "cls":
      pooled = x[:, 0]
      others = x[:, 1 : options.class_tokens] if options.class_tokens > 1 else None
    elif options.pool == "pooler":
      pooled = jnp.tanh(Dense(sizes.width, dtype=dtype, name="pooler")(x[:, 0]))
    elif options.pool == "max":
      pooled = patches.max(1)
    elif options.pool == "mean":
      pooled = base.masked_mean(patches, None)
    elif options.pool == "cls+mean":
      pooled = jnp.concatenate([x[:, 0], base.masked_mean(patches, None)], -1)
    else:
      pooled = base.MapHead(options, name="map_head")(x)
    return base.TowerOutput(pooled, patches, others=others)

  def _positions(self, rows: int, cols: int) -> jax.Array:
    """[1, rows * cols, D]."""
    width = self.options.sizes.width
    if self.options.positions == "sincos2d":
      return jnp.asarray(sincos2d(rows, cols, width))[None]
    grid = self.grid or (rows, cols)
    drawn = self.drawn or grid

    def init(key: jax.Array) -> jax.Array:
      draw = nn.initializers.normal(1 / np.sqrt(width))
      return resampled(draw(key, (1, drawn[0] * drawn[1], width)), drawn, grid)

    return resampled(self.param("positions", init), grid, (rows, cols))

  def _extra_tokens(self, x: jax.Array) -> jax.Array:
    """[B, extra, D]: class tokens, the only ones that can have positions, and the registers."""
    options, width, dtype = self.options, self.options.sizes.width, self.options.compute_dtype
    shape = (1, options.extra_tokens, width)
    tokens = self.param("extra_tokens", nn.initializers.normal(0.02), shape)
    tokens = jnp.asarray(tokens, dtype)
    if options.class_position:
      count = options.class_tokens
      position = self.param("class_position", nn.initializers.zeros, (1, count, width))
      tokens = tokens.at[:, :count].add(position.astype(dtype))
    return jnp.broadcast_to(tokens, (x.shape[0], *shape[1:]))

  def _keep_some(self, x: jax.Array) -> jax.Array:
    """[B, N, D] -> [B, n, D]: a random subset for each image, in the order of the patches."""
    batch, n, _ = x.shape
    chosen = some_patches(self.make_rng("patch_dropout"), batch, n, 1 - self.options.patch_dropout)
    return jnp.take_along_axis(x, chosen[..., None], axis=1)


def some_patches(key: jax.Array, batch: int, count: int, share: float) -> jax.Array:
  """[batch, n] int32: for each image a random share of `count` patches, at least one, in order."""
  order = jnp.argsort(jax.random.uniform(key, (batch, count)), axis=1)
  return jnp.sort(order[:, : max(1, round(count * share))], axis=1)
