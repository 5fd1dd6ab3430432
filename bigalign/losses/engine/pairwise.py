"""The one place where the B x B logits are formed: in tiles, over a mesh, in bounded memory.

A loss says what one tile is and how its rows and columns are reduced; it knows no devices:

  def tile(row, col, shared):                     # rows n of the images, columns m of the texts
    z = shared["scale"] * products(row["z"], col["z"])                            # [n, m]
    return {"i2t": z, "t2i": z}

  out = reduce(tile, {"z": zimg}, {"z": ztxt}, {"scale": scale},
               outputs={"i2t": "row_lse", "t2i": "col_lse"})                      # [N], [M]

Rows stay where they lie; columns come by. The backward pass forms each tile again. How the columns
come is the engine's business (`engine`), and changes the result by rounding only:

  dense    one [N, M] matrix that the compiler lays out; plain differentiation. The reference.
  gather   all columns gathered once, then tile by tile.
  segment  a part of the columns gathered at a time, its gradient scattered back before the next.
  ring     columns travel from device to device, their statistics and gradients with them.
  auto     gather while the gathered columns fit in the budget, else segment.

Memory of one device beyond its own rows and columns, for N rows over W devices (b = N / W) and
width E: dense O(bM), gather O(ME), segment O(budget), ring O(bE); and a tile. Products: 2 NME
forward and 6 NME backward (`reduce`); 6 in all for a sum (`total`), whose gradient waits for no
statistic and is made together with the value.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigalign import config, sharding
from bigalign.losses.engine import exchange, tiles
from bigalign.losses.engine.tiles import Arrays, Tile

WAYS = ("auto", "dense", "gather", "segment", "ring")


@dataclasses.dataclass(frozen=True)
class Engine:
  """How logits are formed. A config's `logits`.

  way: auto, dense, gather, segment or ring.
  dtype: of the features on the wires and of the factors of all products, "float32" or "bfloat16";
    sums, statistics and gradients are added up in float32. bfloat16 moves a logit by up to 0.4 at a
    scale of 100; it halves the traffic, and on TPUs the products of float32 take six passes.
  budget_mb: of gathered columns and their gradients per device; sizes the segments.
  tile_mb: of one float32 tile, of which a few live at a time; 17 is 16 MiB.
  """

  way: str = "auto"
  dtype: str = "float32"
  budget_mb: float = 256.0
  tile_mb: float = 17.0

  def __post_init__(self) -> None:
    config.known("config.logits.way", self.way, WAYS)
    config.known("config.logits.dtype", self.dtype, ("float32", "bfloat16"))
    for name in ("budget_mb", "tile_mb"):
      if not getattr(self, name) > 0:
        raise ValueError(f"config.logits.{name}={getattr(self, name)!r} must be above 0")


DEFAULT = Engine()
_ENGINE: contextvars.ContextVar[Engine] = contextvars.ContextVar("engine", default=DEFAULT)


@contextlib.contextmanager
def engine(chosen: Engine) -> Iterator[Engine]:
  """Traces the losses inside with this engine, as jax.set_mesh does with a mesh."""
  token = _ENGINE.set(chosen)
  try:
    yield chosen
  finally:
    _ENGINE.reset(token)


_WATCHED: contextvars.ContextVar[list[int] | None] = contextvars.ContextVar("watched", default=None)


@contextlib.contextmanager
def watched() -> Iterator[list[int]]:
  """A list that grows by one entry for each matrix formed inside: the numbers that come by of one
  of its columns."""
  seen: list[int] = []
  token = _WATCHED.set(seen)
  try:
    yield seen
  finally:
    _WATCHED.reset(token)


def products(x: jax.Array, y: jax.Array) -> jax.Array:
  """[n, E], [m, E] -> [n, m] inner products, in the engine's dtype, summed in float32."""
  dtype = jnp.dtype(_ENGINE.get().dtype)
  if dtype == jnp.float32:
    # The accelerators' default precision would move a logit by about 0.4 at a scale of 100.
    return jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
  return _products(dtype, x, y)


def _matmul(dtype: Any, x: jax.Array, y: jax.Array) -> jax.Array:
  found = jnp.matmul(x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)
  return found.astype(x.dtype)


def _products_forward(dtype: Any, x: jax.Array, y: jax.Array) -> Any:
  return _matmul(dtype, x, y.T), (x, y)


def _products_backward(dtype: Any, saved: Any, g: jax.Array) -> Any:
  x, y = saved
  return _matmul(dtype, g, y), _matmul(dtype, g.T, x)


_products = jax.custom_vjp(lambda dtype, x, y: _matmul(dtype, x, y.T), nondiff_argnums=(0,))
_products.defvjp(_products_forward, _products_backward)


def paired(x: jax.Array, y: jax.Array) -> jax.Array:
  """[N, E], [N, E] -> [N]: the diagonal of `products(x, y)`."""
  return jnp.sum(_rounded(x) * _rounded(y), -1)


def _rounded(x: jax.Array) -> jax.Array:
  """What the products see of x, with the gradient of x."""
  dtype = jnp.dtype(_ENGINE.get().dtype)
  if dtype == jnp.float32:
    return x
  return x + jax.lax.stop_gradient(x.astype(dtype).astype(x.dtype) - x)


def same(row: Arrays, col: Arrays) -> jax.Array:
  """[n, m] bool: row and column of a tile have the same place in the batch."""
  return row["at"][:, None] == col["at"][None, :]


def reduce(
  tile: Tile,
  rows: Mapping[str, jax.Array],
  columns: Mapping[str, jax.Array],
  shared: Mapping[str, Any] | None = None,
  *,
  outputs: Mapping[str, str],
  fixed: Collection[str] = (),
) -> dict[str, jax.Array]:
  """Statistics of the rows and columns of a matrix that is never whole.

  Args:
    tile: (row, col, shared) -> {name: [n, m]}, with `row` and `col` some of the rows and columns
      and "at" [n], [m] int32 among them, their places. It must not close over traced values: all
      that it reads is among the arguments. It may return -inf where an lse shall not look.
    rows, columns: {name: [N, ...]}, {name: [M, ...]}. Floating arrays of two or more axes are
      features, and travel in the engine's dtype.
    shared: what all tiles see: scalars, any tree of arrays.
    outputs: name -> "row_lse", "row_sum", "row_max" over the columns, [N], or "col_lse", "col_sum",
      "col_max" over the rows, [M]. A maximum has no gradient.
    fixed: names among rows and columns that have no gradient, a teacher's; none is sent back. They
      are names of both sides.

  Returns:
    {name: [N] or [M]}. An lse over nothing is -inf, with gradient 0.
  """
  plan, tile = _plan(rows, columns), _bound(tile)
  if plan is None:
    rows, columns = (_whole(x, fixed) for x in (rows, columns))
    return tiles.dense(tile, dict(outputs), rows, columns, dict(shared or {}))
  what = tiles.What(tile, tuple(outputs.items()), frozenset(fixed), plan)
  return exchange.reduce(what, dict(rows), dict(columns), dict(shared or {}))


def total(
  tile: Tile,
  rows: Mapping[str, jax.Array],
  columns: Mapping[str, jax.Array],
  shared: Mapping[str, Any] | None = None,
  *,
  fixed: Collection[str] = (),
) -> jax.Array:
  """[]: the sum of all entries of a matrix that is never whole; `tile` returns {name: [n, m]}, all
  of which are added. Value and gradient are made in one pass. Otherwise as `reduce`."""
  plan, tile = _plan(rows, columns), _bound(tile)
  if plan is None:
    rows, columns = (_whole(x, fixed) for x in (rows, columns))
    return tiles.dense_total(tile, rows, columns, dict(shared or {}))
  what = tiles.What(tile, (), frozenset(fixed), plan)
  return exchange.total(what, dict(rows), dict(columns), dict(shared or {}))


def _bound(tile: Tile) -> Tile:
  """The backward pass is traced later, outside of `engine`; the tile takes it along."""
  chosen = _ENGINE.get()

  def bound(*args: Any) -> Arrays:
    with engine(chosen):
      return tile(*args)

  return bound


def _whole(arrays: Mapping[str, jax.Array], fixed: Collection[str]) -> Arrays:
  """As the tiles would see them from the wire."""
  seen = {k: _rounded(x) if _travels(x) else x for k, x in arrays.items()}
  return {k: jax.lax.stop_gradient(x) if k in fixed else x for k, x in seen.items()}


def _travels(x: jax.Array) -> bool:
  return x.ndim > 1 and jnp.issubdtype(x.dtype, jnp.floating)


def _plan(rows: Mapping[str, jax.Array], columns: Mapping[str, jax.Array]) -> tiles.Plan | None:
  """How this matrix is formed here; None: dense."""
  chosen, watch = _ENGINE.get(), _WATCHED.get()
  if watch is not None:
    watch.append(sum(x.size // x.shape[0] for x in columns.values()))
  if chosen.way == "dense":
    return None
  axes, devices = sharding.devices()
  n, m = (next(iter(x.values())).shape[0] for x in (rows, columns))
  own_rows, own_columns = -(-n // devices), -(-m // devices)
  # A gathered column and its float32 gradient.
  column_bytes = sum(
    x.size // m * (jnp.dtype(chosen.dtype).itemsize + 4) for x in columns.values() if _travels(x)
  )
  segments = _power_of_two(m * column_bytes / (chosen.budget_mb * 1e6))
  if chosen.way == "segment":
    segments = max(2, segments)
  segments = 1 if chosen.way == "gather" else min(segments, own_columns)
  chunk = max(1, int(chosen.tile_mb * 1e6 / (4 * own_rows)))
  return tiles.Plan(axes, chosen.way == "ring", segments, chunk, chosen.dtype, n, m)


def _power_of_two(x: float) -> int:
  """The smallest power of two that is at least x."""
  return 1 << max(0, math.ceil(math.log2(max(x, 1))))
