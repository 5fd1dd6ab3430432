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
import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigalign import checks, sharding
from bigalign.losses.engine import exchange, tiles
from bigalign.losses.engine.tiles import Arrays, Tile

WAYS = ("auto", "dense", "gather", "segment", "ring")

Matmul = Callable[[jax.Array, jax.Array], jax.Array]


def _bfloat16(x: jax.Array, y: jax.Array) -> jax.Array:
  narrow = (z.astype(jnp.bfloat16) for z in (x, y))
  return jnp.matmul(*narrow, preferred_element_type=jnp.float32).astype(x.dtype)


def _float32(x: jax.Array, y: jax.Array, *, precision: jax.lax.Precision) -> jax.Array:
  """x @ y. Less than the highest precision would be TF32 on a GPU, so it is only for TPUs."""

  def product(precision: jax.lax.Precision, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=precision)

  exact = functools.partial(product, jax.lax.Precision.HIGHEST)
  if precision == jax.lax.Precision.HIGHEST:
    return exact(x, y)
  chosen: jax.Array = jax.lax.platform_dependent(
    x, y, tpu=functools.partial(product, precision), default=exact
  )
  return chosen


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _products(matmuls: tuple[Matmul, Matmul], x: jax.Array, y: jax.Array) -> jax.Array:
  """[n, E], [m, E] -> [n, m], by two kinds of products: of the result and of its gradients."""
  return matmuls[0](x, y.T)


def _products_forward(matmuls: tuple[Matmul, Matmul], x: Any, y: Any) -> Any:
  # Each is kept for the gradient of the other, if that is needed.
  saved = (x.value if y.perturbed else None, y.value if x.perturbed else None)
  return matmuls[0](x.value, y.value.T), saved


def _products_backward(matmuls: tuple[Matmul, Matmul], saved: Any, g: jax.Array) -> Any:
  x, y = saved
  return None if y is None else matmuls[1](g, y), None if x is None else matmuls[1](g.T, x)


_products.defvjp(_products_forward, _products_backward, symbolic_zeros=True)

_HIGH, _HIGHEST, _ONE_PASS = (
  functools.partial(_float32, precision=precision)
  for precision in (jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT)
)
PRECISIONS = {"high": (_HIGH, _ONE_PASS), "highest": (_HIGHEST, _HIGHEST)}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Engine:
  """How logits are formed, and the functions that form them. `config.logits` holds its options.

  Args:
    way: "auto", "dense", "gather", "segment" or "ring".
    dtype: "float32" or "bfloat16", the dtype of communicated features and of the factors of all
      products; sums, reductions and gradients are accumulated in float32. With bfloat16, rounding
      changes a logit by up to 0.4 at a scale of 100, communication is halved, and a TPU multiplies
      in one pass.
    precision: of products in float32 on TPUs, which multiply bfloat16 numbers in several passes:
      "high" takes three passes for logits, whose error is below 1e-3 at a scale of 100, and one for
      their gradients, whose error is that of a rounding to bfloat16; "highest" takes six for both.
      CPUs and GPUs compute all products in float32.
    budget_mb: MB of gathered columns and their gradients per device; sets the number of segments.
    tile_mb: MB (1e6 bytes) of one float32 tile; a few exist at a time. The default is just above
      16 MiB.
  """

  way: str = "auto"
  dtype: str = "float32"
  precision: str = "high"
  budget_mb: float = 256.0
  tile_mb: float = 17.0

  def __post_init__(self) -> None:
    checks.known("config.logits.way", self.way, WAYS)
    checks.known("config.logits.dtype", self.dtype, ("float32", "bfloat16"))
    checks.known("config.logits.precision", self.precision, PRECISIONS)
    for name in ("budget_mb", "tile_mb"):
      if not getattr(self, name) > 0:
        raise ValueError(f"config.logits.{name}={getattr(self, name)!r} must be above 0")

  def products(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """[n, E], [m, E] -> [n, m] inner products, in the engine's dtype, summed in float32."""
    if self.dtype == "float32":
      return _products(PRECISIONS[self.precision], x, y)
    return _products((_bfloat16, _bfloat16), x, y)

  def paired(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """[N, E], [N, E] -> [N]: the diagonal of `products(x, y)`; of more axes likewise the last."""
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


def _power_of_two(x: float) -> int:
  """The smallest power of two that is at least x."""
  return 1 << max(0, math.ceil(math.log2(max(x, 1))))
