"""The device mesh, shardings of parameters by rules over their paths, and the global batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bigalign import tree

T = TypeVar("T")

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that split the batch
COPIES = "data"  # the axis over which the model is copied

# (regular expression, mesh axes of one layer's array). The fsdp axis is added to each parameter on
# its largest free axis; "replicate" instead of axes prevents that.
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
  """Returns a mesh with the axes data, fsdp and tensor; one size may be -1: the remaining devices.

  Args:
    data: number of copies of the model, each of which sees a part of the batch.
    fsdp: number of parts of each parameter; the batch is split over them too.
    tensor: number of parts of the heads and hidden units of each layer.
    devices: all of them if None. Several TPU slices hold equally many copies of the model, so that
      only gradients between copies use the slower network between slices.

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
      f" three sizes must multiply to {n}; one of them may be -1, for the rest."
    )
  if sizes["data"] % slices:
    raise ValueError(
      f"config.mesh.data={sizes['data']} does not divide over {slices} slices. Each slice"
      " holds whole copies of the model: make data a multiple, and fsdp and tensor smaller"
    )
  if slices > 1:
    inside = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
    array = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices=devices)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * 3)
  # jax.make_mesh defaults to Explicit axes, under which FSDP matmuls are ambiguous.
  return jax.make_mesh(
    tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
  )


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh, axes: Any) -> P:
  """The partition of one array: the rule's axes, then fsdp on the largest axis it divides."""
  if axes == "replicate":
    return P()
  named = [] if isinstance(axes, str) else [axis for axis in axes if axis is not None]
  if isinstance(axes, str) or any(axis not in AXES for axis in named) or len({*named}) < len(named):
    raise ValueError(
      f"config.rules: {axes!r} for {path} must be 'replicate', or name an axis of the mesh or None"
      f" for each axis of the array, none twice; the mesh has {AXES}"
    )
  first = int(tree.is_stacked(path))  # scanned layers are stacked on axis 0, which is not split
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
  free = [i for i in range(first, len(shape)) if spec[i] is None and shape[i] % n == 0]
  if n > 1 and free and "fsdp" not in spec and math.prod(shape) >= 1024:
    spec[max(free, key=lambda i: shape[i])] = "fsdp"
  return P(*spec)


def shardings(
  arrays: Mapping[str, Any], mesh: Mesh, rules: Sequence[tuple[str, Any]] | None = None
) -> dict[str, NamedSharding]:
  """Returns the sharding of each array, by the first rule that matches its path.

  Args:
    arrays: {path: array or shape}.
    mesh: the mesh to shard over.
    rules: (regular expression, mesh axes of one layer's array, or "replicate") pairs; None: RULES,
      of which some may match no path.

  Returns:
    {path: NamedSharding}.

  Raises:
    ValueError: for a path without a rule, a rule without a path, or an axis that does not divide.
  """
  chosen = tree.match(
    RULES if rules is None else rules, arrays, "config.rules", idle_rules=rules is None
  )
  return {
    path: NamedSharding(mesh, _spec(path, x.shape, mesh, chosen[path]))
    for path, x in arrays.items()
  }


def shardings_like(
  structure: Any, params: Mapping[str, NamedSharding], shapes: Mapping[str, Any]
) -> Any:
  """Returns shardings for a state that is keyed by parameter paths, such as optimizer moments.

  A leaf under the path of a parameter, with the shape of the parameter, gets its sharding. Other
  leaves (counters, factored moments) are replicated.

  Args:
    structure: tree of arrays or shapes.
    params: {path: sharding} of the parameters.
    shapes: {path: array or shape} of the parameters.

  Returns:
    A tree of the same structure with shardings as leaves.
  """
  mesh = next(iter(params.values())).mesh

  def sharding_of(keys: Any, leaf: Any) -> NamedSharding:
    for key in reversed(keys):
      path = getattr(key, "key", "")
      if path in params and shapes[path].shape == leaf.shape:
        return params[path]
    return NamedSharding(mesh, P())

  return jax.tree_util.tree_map_with_path(sharding_of, structure)


def replicated_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that is complete on every device."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: axis 0 over data and fsdp, replicated over tensor."""
  return NamedSharding(mesh, P(BATCH))


def devices() -> tuple[tuple[str, ...], int]:
  """Returns the axes of the current mesh and its number of devices; ((), 1) outside a mesh.

  Inside `on_each_copy`, the mesh is that of one copy of the model.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = () if mesh.empty else tuple(a for a in mesh.axis_names if a not in mesh.manual_axes)
  return axes, math.prod(mesh.shape[axis] for axis in axes)


def batch_axes() -> tuple[str, ...]:
  """Returns the axes of the current mesh that split the batch; inside `on_each_copy`, its rows."""
  return tuple(axis for axis in BATCH if axis in devices()[0])


def on_each_device(function: Callable[..., Any], specs: Any, out: Any) -> Callable[..., Any]:
  """Returns a function that applies `function` to each device's part of its arguments.

  Outside a mesh, it is `function` itself.

  Args:
    function: of local arrays.
    specs: PartitionSpecs of the arguments, as in jax.shard_map.
    out: PartitionSpecs of the results.
  """
  axes = devices()[0]
  if not axes:
    return function
  return jax.shard_map(function, in_specs=specs, out_specs=out, axis_names={*axes}, check_vma=False)


def copies() -> int:
  """Returns how many copies of the model the current mesh holds; 1 outside a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape[COPIES]


def on_each_copy(function: Callable[..., Any], specs: Any, out: Any) -> Callable[..., Any]:
  """Returns a function that applies `function` once for each copy of the model.

  The compiler distributes `function` over the devices of a copy, as it does outside. Sums over rows
  are those of the copy's own rows, until `function` adds them up over COPIES.

  Args:
    function: of the arrays of one copy.
    specs: PartitionSpecs of the arguments, which name no axis but COPIES.
    out: PartitionSpecs of the results, likewise.
  """
  return jax.shard_map(
    function, in_specs=specs, out_specs=out, axis_names={COPIES}, check_vma=False
  )


def batch_parts() -> int:
  """Returns into how many parts the current mesh splits a batch; 1 outside a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH)


def constrain_batch(x: jax.Array) -> jax.Array:
  """Constrains axis 0 of an activation to the batch axes; outside a mesh, returns x.

  Without it GSPMD may communicate activations instead of weights: under FSDP, one missing
  constraint multiplied the communicated bytes of a compiled So400m step by 80.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  spec = P(batch_axes(), *[None] * (x.ndim - 1))
  constrained: jax.Array = jax.lax.with_sharding_constraint(x, spec)
  return constrained


def replicate(x: jax.Array) -> jax.Array:
  """Gathers an array onto every device before it is used; outside a mesh, returns x.

  Use it for arrays that are indexed, such as token embeddings. A lookup in a sharded table returns
  a result split along the axes of the table, and GSPMD can only reshard that to the batch axes by
  gathering the whole batch on every device ("involuntary full rematerialization").
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  replicated: jax.Array = jax.lax.with_sharding_constraint(x, P())
  return replicated


def block_on_cpu(x: T) -> T:
  """Returns x, the results of a program just started; on several CPU devices, waits for them.

  CPU devices share a few threads: two running programs with collectives can occupy all of them and
  deadlock. Accelerators run one program after the other.
  """
  if jax.device_count() > 1 and jax.default_backend() == "cpu":
    jax.block_until_ready(x)
  return x


def host_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Returns the rows of the global batch that the devices of this process own.

  Args:
    mesh: of all devices.
    batch_size: global.

  Returns:
    [b] int64, ascending.

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
  slices: Any = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
  rows = {i for (s,) in slices for i in range(*s.indices(batch_size))}
  return np.asarray(sorted(rows), np.int64)


def global_batch(
  mesh: Mesh, batch: Mapping[str, np.ndarray], rows: np.ndarray, batch_size: int
) -> dict[str, jax.Array]:
  """Assembles a global batch from the rows of each host.

  Args:
    mesh: of all devices.
    batch: {field: [b, …]}, the rows of this process.
    rows: [b], their numbers in the global batch: host_rows.
    batch_size: global.

  Returns:
    {field: [batch_size, …]}, global arrays split over the batch axes.
  """
  sharding = batch_sharding(mesh)

  def global_array(x: np.ndarray) -> jax.Array:
    def part(index: Any) -> np.ndarray:
      start, stop, _ = index[0].indices(batch_size)
      first = int(np.searchsorted(rows, start))
      return x[first : first + stop - start]

    return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, part)

  return {name: global_array(x) for name, x in batch.items()}


def host_part(x: jax.Array) -> np.ndarray:
  """Returns the rows of a global array that the devices of this process own.

  The inverse of `global_batch`, in the order of `host_rows`.

  Args:
    x: [B, …], split over the batch axes.
  """
  parts = {part.index[0].start or 0: part.data for part in x.addressable_shards}
  return np.concatenate([np.asarray(parts[first]) for first in sorted(parts)])
