"""Decoders of captions: transformers whose tokens attend to each other and to those of an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigalign import checks, sharding
from bigalign.towers import base
from bigalign.towers.linear import lookup

Variables = Mapping[str, Any]  # a collection of flax: a tree of arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderOptions(base.TransformerOptions):
  """The options of a decoder, which its loss sets.

  Args:
    bias: whether linear maps and norms have biases.
    two_mlps: whether an MLP also follows self-attention and every layer norms the tokens of the
      image, as in CoCa; else a layer is self-attention, cross-attention and an MLP.
  """

  place: ClassVar[str] = "config.loss"

  bias: bool = True
  two_mlps: bool = False


class Layer(nn.Module):
  """One layer of a Decoder, whose arguments it has."""

  options: DecoderOptions

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    memory: jax.Array | None,
    visible: jax.Array | None,
    places: base.Places | None = None,
  ) -> tuple[jax.Array, None]:
    """[B, L, D] -> ([B, L, D], None); nn.scan expects a pair."""
    options, dtype = self.options, self.options.compute_dtype
    _, _, heads, hidden = options.sizes
    biases = "qkvo" if options.bias else ""

    def norm(name: str, x: jax.Array) -> jax.Array:
      module = nn.LayerNorm(options.epsilon, dtype, use_bias=options.bias, name=name)
      normed: jax.Array = module(x)
      return normed

    def attention(name: str) -> base.Attention:
      return base.Attention(heads, dtype, biases, name=name)

    def mlp(name: str) -> base.Mlp:
      return base.Mlp(hidden, options.activation, dtype=dtype, bias=options.bias, name=name)

    y = norm("ln1", x)
    causal = visible is None
    x = x + attention("attn")(y, y, causal=causal, bias=visible, places=places)
    if options.two_mlps:
      x = x + mlp("attn_mlp")(norm("ln_attn_mlp", x))
    if memory is not None:
      seen = norm("ln_memory", memory) if options.two_mlps else memory
      x = x + attention("cross_attn")(norm("ln_cross", x), seen, keep=places is not None)
    x = x + mlp("mlp")(norm("ln2", x))
    return sharding.constrain_batch(x), None


class Decoder(nn.Module):
  """A stack of layers and a layer norm; `scan` and `remat` as of towers.base.Encoder.

  Args:
    options: see DecoderOptions.
  """

  options: DecoderOptions

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    memory: jax.Array | None = None,
    visible: jax.Array | None = None,
    places: base.Places | None = None,
  ) -> jax.Array:
    """[B, L, D] -> [B, L, D], normed.

    Args:
      x: [B, L, D], embedded tokens.
      memory: [B, N, any width], tokens of the image for cross-attention; None: without.
      visible: [B or 1, 1, L, L], added to the logits of self-attention; None: causal.
      places: of the tokens, if they follow those of earlier calls. Their keys and values are in the
        collection "cache", and those of `memory` in the collection "memory".
    """
    options, kind, dtype = self.options, Layer, self.options.compute_dtype
    policy = checks.choose(base.REMAT, options.remat, "remat")
    if policy is not None:
      kind = nn.remat(kind, policy=policy, prevent_cse=not options.scan)
    x = sharding.constrain_batch(x.astype(dtype))
    memory = None if memory is None else memory.astype(dtype)
    if options.scan:
      stack = nn.scan(
        kind,
        variable_axes={"params": 0, "cache": 0, "memory": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=options.sizes.depth,
      )
      x, _ = stack(options, name="blocks")(x, memory, visible, places)
    else:
      for i in range(options.sizes.depth):
        x, _ = kind(options, name=f"block_{i}")(x, memory, visible, places)
    norm = nn.LayerNorm(options.epsilon, dtype, use_bias=options.bias, name="ln")
    decoded: jax.Array = norm(x)
    return decoded


class TokenDecoder(nn.Module):
  """A decoder with a token table and positions of its own.

  Args:
    options: see DecoderOptions.
    rows: of the token table.
    length: tokens of a text.
  """

  options: DecoderOptions
  rows: int
  length: int

  @nn.compact
  def __call__(
    self,
    ids: jax.Array,
    memory: jax.Array,
    visible: jax.Array | None,
    places: base.Places | None = None,
  ) -> jax.Array:
    """[B, L] int32 -> [B, L, D]; other arguments as of Decoder."""
    width, dtype = self.options.sizes.width, self.options.compute_dtype
    table = self.param("embedding", nn.initializers.normal(0.02), (self.rows, width))
    positions = self.param("positions", nn.initializers.normal(0.01), (1, self.length, width))
    positions, count = positions.astype(dtype), ids.shape[1]
    if places is None:
      own = positions[:, :count]
    else:
      own = jax.lax.dynamic_slice_in_dim(positions, places.first, count, 1)
    x = lookup(table, ids, dtype) + own
    decoded: jax.Array = Decoder(self.options, name="decoder")(x, memory, visible, places)
    return decoded


def begin(
  module: nn.Module, params: Any, *args: Any, method: Any = None
) -> tuple[Variables, Variables]:
  """What a module keeps of the first tokens of texts: the collections "memory" and "cache".

  Args:
    module: a Decoder, or another one that takes base.Places.
    params: of it.
    *args: of the module, with the places.
    method: of the module; None: its call.
  """
  _, kept = module.apply({"params": params}, *args, method=method, mutable=["memory", "cache"])
  return kept.get("memory", {}), kept["cache"]


def read_on(
  module: nn.Module, params: Any, kept: tuple[Variables, Variables], *args: Any, method: Any = None
) -> tuple[Any, Variables]:
  """(output for more tokens, the collection "cache" after them).

  Args:
    module: as of `begin`.
    params: of it.
    kept: what it keeps of the tokens before.
    *args: of the module, with the places.
    method: as of `begin`.
  """
  memory, cache = kept
  variables = {"params": params, "memory": memory, "cache": cache}
  output, changed = module.apply(variables, *args, method=method, mutable=["cache"])
  return output, changed["cache"]


def options_of(
  dtype: Any, text_width: int, *, width: int | None, heads: int | None, **given: Any
) -> DecoderOptions:
  """The options of a decoder.

  Args:
    dtype: of its computation, that of the tokens that it reads.
    text_width: width of the tokens of the text tower.
    width: D; None: that of the text tower.
    heads: of attention; None: one for 64 units of the width, at least one.
    **given: other options of DecoderOptions.
  """
  width = width or text_width
  heads = heads or max(1, width // 64)
  name = jnp.dtype(dtype).name
  return DecoderOptions(width=width, heads=heads, dtype=name, attention=None, **given)
