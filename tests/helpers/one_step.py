"""One update of a small config on any mesh, always from the same first state."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import jax
import numpy as np

from bigalign import sharding
from bigalign.config import resolve_config
from bigalign.program import check_loss, init_on_mesh, layout, make_program
from bigalign.step import data_position, jitted

# To trace and compile the initialisation takes a third of the time of an update. Its
# values do not depend on meshes, microbatches and recomputation.
_first: dict[str, Any] = {}
_WITHOUT_EFFECT = ("mesh", "microbatches", "remat")


class Updated(NamedTuple):
  """What one update did.

  trainable, twin: {path: the parameter, or the average, before it less after it}. scalars: that are
  logged. compiled: the program.
  """

  trainable: dict[str, np.ndarray]
  twin: dict[str, np.ndarray]
  scalars: dict[str, np.ndarray]
  compiled: Any


def update(values, field) -> Updated:
  """One update.

  Args:
    values: of a config, which names the sizes of its mesh.
    field: (random generator, name, shape, dtype) -> that field of the batch.
  """
  config = resolve_config(values)
  program = make_program(config, dataset_size=1000)
  check_loss(program)
  size = np.prod([*values["mesh"].values()], dtype=int)
  mesh = config.mesh.make(devices=jax.devices()[:size])
  rng = np.random.default_rng(0)
  batch = {
    name: jax.device_put(field(rng, name, shape, dtype), sharding.batch_sharding(mesh))
    for name, (shape, dtype) in program.spec.items()
  }
  position = jax.device_put(data_position(0, 1), sharding.replicated_sharding(mesh))
  with jax.set_mesh(mesh):
    _, shardings = layout(program, mesh)
    key = json.dumps(_without(values), sort_keys=True, default=repr)
    if key not in _first:
      _first[key] = jax.tree.map(np.asarray, init_on_mesh(program, shardings))
    before = _first[key]
    state = jax.device_put(before, shardings)
    compiled = jitted(program, shardings, mesh).lower(state, batch, position).compile()
    after, scalars, checks = compiled(state, batch, position)
  assert all(jax.tree.leaves(checks.finite))
  trainable, twin = (
    {path: old[path] - np.asarray(x) for path, x in new.items()}
    for old, new in ((before.trainable, after.trainable), (before.twin, after.twin))
  )
  return Updated(trainable, twin, jax.tree.map(np.asarray, scalars), compiled)


def _without(values):
  """The values without those that the first state does not depend on."""
  if not isinstance(values, dict):
    return values
  return {k: _without(x) for k, x in values.items() if k not in _WITHOUT_EFFECT}
