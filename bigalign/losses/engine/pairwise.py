"""The one place where the B x B logits are formed: in tiles, over a mesh, in bounded memory.

A loss defines one tile of the matrix and how its rows and columns are reduced. It does not know
about devices:

  def tile(row, col, shared):              # row: n of the images; col: m of the texts
    z = shared["scale"] * engine.products(row["z"], col["z"])                            # [n, m]
    return {"i2t": z, "t2i": z}

  out = engine.reduce(tile, {"z": zimg}, {"z": ztxt}, {"scale": scale},
                      outputs={"i2t": "row_lse", "t2i": "col_lse"})                      # [N], [M]

Image rows stay on their device; text columns are streamed past them. The backward pass recomputes
each tile. How the columns are streamed is chosen by `Engine.way`; it changes the result only by
rounding:

  dense    one [N, M] matrix, laid out by the compiler; plain differentiation. The reference.
  gather   all-gather all columns once, then compute tile by tile.
  segment  all-gather a part of the columns at a time; reduce-scatter its gradient before the next.
  ring     pass the columns from device to device, with their partial reductions and gradients.
  auto     gather if the gathered columns fit in the budget, else segment.

Per-device memory in addition to the device's own rows and columns, for N rows over W devices
(b = N / W) and width E: dense O(bM), gather O(ME), segment O(budget), ring O(bE); and one tile.
Products: 2 NME forward and 6 NME backward (`reduce`); 6 NME in all for a sum (`total`), whose
gradient needs no reduction first and is computed together with the value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigalign import checks, sharding
from bigalign.losses.engine import exchange, tiles
from bigalign.losses.engine.tiles import Arrays, Tile

WAYS = ("auto", "dense", "gather", "segment", "ring")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Engine:
  """How logits are formed, and the functions that form them. `config.logits` holds its options.

  Args:
    way: "auto", "dense", "gather", "segment" or "ring".
    dtype: "float32" or "bfloat16", the dtype of communicated features and of the factors of all
      products; sums, reductions and gradients are accumulated in float32. With bfloat16, rounding
      changes a logit by up to 0.4 at a scale of 100, communication is halved, and a TPU multiplies
      in one pass instead of six.
    budget_mb: MB of gathered columns and their gradients per device; sets the number of segments.
    tile_mb: MB (1e6 bytes) of one float32 tile; a few exist at a time. The default is just above
      16 MiB.
  """

  way: str = "auto"
  dtype: str = "float32"
  budget_mb: float = 256.0
  tile_mb: float = 17.0

  def __post_init__(self) -> None:
    checks.known("config.logits.way", self.way, WAYS)
    checks.known("config.logits.dtype", self.dtype, ("float32", "bfloat16"))
    for name in ("budget_mb", "tile_mb"):
      if not getattr(self, name) > 0:
        raise ValueError(f"config.logits.{name}={getattr(self, name)!r} must be above 0")

  def products(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """[n, E], [m, E] -> [n, m] inner products, in the engine's dtype, summed in float32."""
    dtype = jnp.dtype(self.dtype)
    if dtype == jnp.float32:
      # The accelerators' default precision would move a logit by about 0.4 at a scale of 100.
      return jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    return _products(dtype, x, y)

  def paired(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """[N, E], [N, E] -> [N]: the diagonal of `products(x, y)`."""
    x, y = self._as_communicated({"x": x, "y": y}, ()).values()
    return jnp.sum(x * y, -1)

  def reduce(
    self,
    tile: Tile,
    rows: Mapping[str, jax.Array],
    columns: Mapping[str, jax.Array],
    shared: Mapping[str, Any] | None = None,
    *,
    outputs: Mapping[str, str],
    fixed: Collection[str] = (),
  ) -> dict[str, jax.Array]:
    """Reductions over the rows and columns of a matrix that is never materialised.

    Args:
      tile: (row, col, shared) -> {name: [n, m]}. `row` and `col` hold some of the rows and columns,
        and their positions in the batch, "batch_index" [n], [m] int32. The function must not close
        over traced values: everything traced that it reads is among its arguments. It may return
        -inf for entries that an lse must ignore.
      rows: {name: [N, ...]}. Floating arrays of two or more axes are features; they are rounded to
        the engine's dtype.
      columns: {name: [M, ...]}, likewise; these are communicated.
      shared: what every tile reads: scalars, or any tree of arrays.
      outputs: name -> "row_lse", "row_sum", "row_max" over the columns, [N], or "col_lse",
        "col_sum", "col_max" over the rows, [M]. A maximum has no gradient.
      fixed: names in `rows` and `columns` that get no gradient, such as a teacher's features; none
        is communicated for them.

    Returns:
      {name: [N] or [M]}. An lse over no entries is -inf, with gradient 0.
    """
    plan = self._plan(rows, columns)
    if plan is None:
      rows, columns = (self._as_communicated(x, fixed) for x in (rows, columns))
      return tiles.dense(tile, dict(outputs), rows, columns, dict(shared or {}))
    reduction = tiles.TiledReduction(tile, tuple(outputs.items()), frozenset(fixed), plan)
    return exchange.reduce(reduction, dict(rows), dict(columns), dict(shared or {}))

  def total(
    self,
    tile: Tile,
    rows: Mapping[str, jax.Array],
    columns: Mapping[str, jax.Array],
    shared: Mapping[str, Any] | None = None,
    *,
    fixed: Collection[str] = (),
  ) -> jax.Array:
    """[]: the sum of all entries of a matrix that is never materialised.

    Value and gradient are computed in one pass. The arguments are those of `reduce`; all arrays
    that `tile` returns are added.
    """
    plan = self._plan(rows, columns)
    if plan is None:
      rows, columns = (self._as_communicated(x, fixed) for x in (rows, columns))
      return tiles.dense_total(tile, rows, columns, dict(shared or {}))
    reduction = tiles.TiledReduction(tile, (), frozenset(fixed), plan)
    return exchange.total(reduction, dict(rows), dict(columns), dict(shared or {}))

  def replaced(
    self, queue: Mapping[str, jax.Array], new: Mapping[str, jax.Array], start: jax.Array
  ) -> dict[str, jax.Array]:
    """A ring buffer with new elements at positions start, start + 1, … modulo its length.

    The buffer stays on its devices. The new elements are communicated as columns are, but exactly.

    Args:
      queue: {name: [K, ...]}.
      new: {name: [B, ...]}, with B at most K.
      start: [] int32, in [0, K).
    """
    # A RecordingEngine records matrices, and this is not one, so its own _plan is not called. The
    # dense way has no plan, and without one the compiler would gather the whole queue.
    way = "gather" if self.way == "dense" else self.way
    plan = Engine._plan(dataclasses.replace(self, way=way), queue, new)
    assert plan is not None
    return exchange.replaced(plan, dict(queue), dict(new), start)

  def _rounded(self, x: jax.Array) -> jax.Array:
    """x rounded to the engine's dtype, as the products see it, with the gradient of x."""
    dtype = jnp.dtype(self.dtype)
    if dtype == jnp.float32:
      return x
    return x + jax.lax.stop_gradient(x.astype(dtype).astype(x.dtype) - x)

  def _as_communicated(self, arrays: Mapping[str, jax.Array], fixed: Collection[str]) -> Arrays:
    """The arrays as tiles would receive them: features rounded, `fixed` without a gradient."""
    wide = tiles.widened(arrays)
    rounded = {k: self._rounded(x) if tiles.is_feature(x) else x for k, x in wide.items()}
    return {k: jax.lax.stop_gradient(x) if k in fixed else x for k, x in rounded.items()}

  def _plan(
    self, rows: Mapping[str, jax.Array], columns: Mapping[str, jax.Array]
  ) -> tiles.Plan | None:
    """How this matrix is formed on the current mesh; None: dense."""
    if self.way == "dense":
      return None
    axes, devices = sharding.devices()
    n, m = (next(iter(x.values())).shape[0] for x in (rows, columns))
    own_rows, own_columns = -(-n // devices), -(-m // devices)
    # A gathered column, and its gradient in float32 or, under x64, in float64.
    column_bytes = sum(
      x.size // m * (tiles.communicated_dtype(x, self.dtype).itemsize + max(4, x.dtype.itemsize))
      for x in columns.values()
      if tiles.is_feature(x)
    )
    segments = _power_of_two(m * column_bytes / (self.budget_mb * 1e6))
    if self.way == "segment":
      segments = max(2, segments)
    segments = 1 if self.way == "gather" else min(segments, own_columns)
    chunk = max(1, int(self.tile_mb * 1e6 / (4 * own_rows)))
    return tiles.Plan(axes, self.way == "ring", segments, chunk, self.dtype, n, m)


@dataclasses.dataclass(frozen=True)
class RecordingEngine(Engine):
  """An engine that also records the matrices it forms, for a summary of a loss.

  Args:
    floats_per_column: one entry for each matrix traced: how many values of each column are
      communicated.
  """

  floats_per_column: list[int] = dataclasses.field(default_factory=list, compare=False)

  def _plan(
    self, rows: Mapping[str, jax.Array], columns: Mapping[str, jax.Array]
  ) -> tiles.Plan | None:
    self.floats_per_column.append(sum(x.size // x.shape[0] for x in columns.values()))
    return super()._plan(rows, columns)


DEFAULT = Engine()


def same(row: Arrays, col: Arrays) -> jax.Array:
  """[n, m] bool: the row and the column of a tile have the same position in the batch."""
  return row["batch_index"][:, None] == col["batch_index"][None, :]


def _matmul(dtype: Any, x: jax.Array, y: jax.Array) -> jax.Array:
  product = jnp.matmul(x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)
  return product.astype(x.dtype)


def _products_forward(dtype: Any, x: jax.Array, y: jax.Array) -> Any:
  return _matmul(dtype, x, y.T), (x, y)


def _products_backward(dtype: Any, saved: Any, g: jax.Array) -> Any:
  x, y = saved
  return _matmul(dtype, g, y), _matmul(dtype, g.T, x)


_products = jax.custom_vjp(lambda dtype, x, y: _matmul(dtype, x, y.T), nondiff_argnums=(0,))
_products.defvjp(_products_forward, _products_backward)


def _power_of_two(x: float) -> int:
  """The smallest power of two that is at least x."""
  return 1 << max(0, math.ceil(math.log2(max(x, 1))))
