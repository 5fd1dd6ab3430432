"""Where arrays live: the mesh, rules over parameter paths, and the global batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bigalign import tree

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that split the batch

# (regular expression, axes of one layer's array). The fsdp axis is added to each parameter where
# it fits best; "replicate" instead of axes keeps it off.
RULES: tuple[tuple[str, Any], ...] = (
  (r"attn/(query|key|value)/kernel$", (None, "tensor", None)),
  (r"attn/(query|key|value)/bias$", ("tensor", None)),
  (r"attn/out/kernel$", ("tensor", None, None)),
  (r"mlp/(fc1|gate)/kernel$", (None, "tensor")),
  (r"mlp/(fc1|gate)/bias$", ("tensor",)),
  (r"mlp/fc2/kernel$", ("tensor", None)),
  (r"", ()),
)


def make_mesh(
  *, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh with the axes data, fsdp, tensor; one size may be -1: what is left.

  Args:
    data: copies of the model that each see a part of the batch.
    fsdp: parts of each parameter; the batch is split over it too.
    tensor: parts of each layer's heads and hidden units.
    devices: all of them if None. Several slices of TPUs each hold as many of the copies, so that
      only these speak over the slower network between slices.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  n, slices = len(devices), len({getattr(device, "slice_index", 0) for device in devices})
  sizes = dict(data=data, fsdp=fsdp, tensor=tensor)
  free = [axis for axis, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(free) == 1 and fixed > 0 and n % fixed == 0:
    sizes[free[0]] = n // fixed
  if any(size < 1 for size in sizes.values()) or math.prod(sizes.values()) != n:
    raise ValueError(
      f"config.mesh: {dict(data=data, fsdp=fsdp, tensor=tensor)} does not fit {n} devices; the"
      f" three sizes must multiply to {n}, and one of them may be -1, for what is left."
    )
  if sizes["data"] % slices:
    raise ValueError(
      f"config.mesh.data={sizes['data']} does not divide over {slices} slices, which copies of the"
      " model do; make it a multiple, and fsdp and tensor smaller"
    )
  if slices > 1:
    inside = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
    grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices=devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)
  # jax.make_mesh defaults to Explicit axes, under which FSDP matmuls are ambiguous.
  return jax.make_mesh(
    tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
  )


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh, axes: Any) -> P:
  """The partition of one array: the rule's axes, then fsdp on the largest axis that it divides."""
  if axes == "replicate":
    return P()
  first = int("/blocks/" in path)  # scanned layers are stacked on axis 0, which stays whole
  spec: list[Any] = [None] * len(shape)
  if axes:
    if len(axes) != len(shape) - first:
      raise ValueError(
        f"config.rules: {tuple(axes)} for {path}, which has {len(shape) - first} axes per layer:"
        f" {shape[first:]}"
      )
    spec[first:] = axes
  for i, axis in enumerate(spec):
    if axis is not None and shape[i] % mesh.shape[axis]:
      fits = [n for n in range(1, mesh.shape[axis]) if shape[i] % n == 0]
      raise ValueError(
        f"config.mesh.{axis}={mesh.shape[axis]} does not divide axis {i} of {path} {shape};"
        f" of the smaller sizes these do: {fits}"
      )
  n = mesh.shape["fsdp"]
  whole = [i for i in range(first, len(shape)) if spec[i] is None and shape[i] % n == 0]
  if n > 1 and whole and "fsdp" not in spec and math.prod(shape) >= 1024:
    spec[max(whole, key=lambda i: shape[i])] = "fsdp"
  return P(*spec)


def shardings(
  arrays: Mapping[str, Any], mesh: Mesh, rules: Sequence[tuple[str, Any]] = RULES
) -> dict[str, NamedSharding]:
  """{path: NamedSharding} for arrays (or their shapes) addressed by path, by the first rule.

  Raises:
    ValueError: for a path without a rule, a rule without a path, or an axis that does not divide.
  """
  chosen = tree.match(rules, arrays, "config.rules")
  return {
    path: NamedSharding(mesh, _spec(path, x.shape, mesh, chosen[path]))
    for path, x in arrays.items()
  }


def shardings_like(
  structure: Any, params: Mapping[str, NamedSharding], shapes: Mapping[str, Any]
) -> Any:
  """Shardings for any state that is keyed by parameter paths (optimizer moments, averages).

  A leaf under a parameter's path with the parameter's shape lies where the parameter lies; any
  other leaf (counters, factored moments) is on every device.
  """
  mesh = next(iter(params.values())).mesh

  def place(keys: Any, leaf: Any) -> NamedSharding:
    for key in reversed(keys):
      path = getattr(key, "key", "")
      if path in params and shapes[path].shape == leaf.shape:
        return params[path]
    return NamedSharding(mesh, P())

  return jax.tree_util.tree_map_with_path(place, structure)


def replicated_sharding(mesh: Mesh) -> NamedSharding:
  """On every device, whole."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Axis 0 over data and fsdp; equal on all devices of the tensor axis."""
  return NamedSharding(mesh, P(BATCH))


def devices() -> tuple[tuple[str, ...], int]:
  """All axes of this mesh, and how many devices it has; () and 1 outside of a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = () if mesh.empty else tuple(mesh.axis_names)
  return axes, math.prod(mesh.shape[axis] for axis in axes)


def on_each_device(function: Callable[..., Any], specs: Any, out: Any) -> Callable[..., Any]:
  """`function` of each device's part of the arguments; of the whole outside of a mesh."""
  if not devices()[0]:
    return function
  return jax.shard_map(function, in_specs=specs, out_specs=out, check_vma=False)


def batch_parts() -> int:
  """How many devices share a batch in this mesh; 1 outside of a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH)


def constrain_batch(x: jax.Array) -> jax.Array:
  """Keeps axis 0 of an activation on the batch axes; outside of a mesh, x.

  Without it GSPMD is free to move activations instead of weights: one missing constraint under FSDP cost
  80 times the bytes on the wire in a compiled So400m step.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, P(BATCH, *[None] * (x.ndim - 1)))


def replicate(x: jax.Array) -> jax.Array:
  """Gathers an array onto every device before it is used; outside of a mesh, x.

  For what is indexed, such as a table of tokens: looked up in parts, the result comes back split
  along the table's axes, and GSPMD can bring it to the batch axes only by way of the whole batch
  on every device ("involuntary full rematerialization").
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, P())


def block_on_cpu(x: Any) -> Any:
  """The arrays of a program that was just started; on several CPU devices, once it has ended.

  The devices of a CPU share a few threads: two programs in flight, each with collectives, can take
  them all and wait for each other for ever. Accelerators run one program after the other.
  """
  if jax.device_count() > 1 and jax.default_backend() == "cpu":
    jax.block_until_ready(x)
  return x


def host_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """[b] int64: the rows of the global batch that this process's devices own, ascending.

  Raises:
    ValueError: if the batch does not divide over the mesh.
  """
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  if batch_size % parts:
    raise ValueError(
      f"config.batch_size={batch_size} does not divide over {parts} batch shards"
      f" (mesh.data={mesh.shape['data']} x mesh.fsdp={mesh.shape['fsdp']}); try"
      f" {max(parts, batch_size // parts * parts)}"
    )
  places: Any = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
  rows = {i for (s,) in places for i in range(*s.indices(batch_size))}
  return np.asarray(sorted(rows), np.int64)


def global_batch(
  mesh: Mesh, batch: Mapping[str, np.ndarray], rows: np.ndarray, batch_size: int
) -> dict[str, jax.Array]:
  """Host rows [b, ...] of each field -> one global array [batch_size, ...] over the mesh."""
  sharding = batch_sharding(mesh)

  def place(x: np.ndarray) -> jax.Array:
    def part(index: Any) -> np.ndarray:
      start, stop, _ = index[0].indices(batch_size)
      first = int(np.searchsorted(rows, start))
      return x[first : first + stop - start]

    return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, part)

  return {name: place(x) for name, x in batch.items()}


def host_part(x: jax.Array) -> np.ndarray:
  """The rows of a global array, split over the batch axes, that this process's devices own.

  In the order of `host_rows`: the way back from `global_batch`.
  """
  parts = {part.index[0].start or 0: part.data for part in x.addressable_shards}
  return np.concatenate([np.asarray(parts[first]) for first in sorted(parts)])
