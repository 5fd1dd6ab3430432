"""The folder of a run whose linear projectors are a map in closed form, of `bigalign compare`."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bigalign import sharding, tree, untrained
from bigalign.config import (
  resolve_config,
  without_stores,
  written_model,
)
from bigalign.data.stores import reader
from bigalign.frozen.alignment import Map
from bigalign.frozen.towers import header, like_stored
from bigalign.program import compute_dtype, layout, make_program
from bigalign.weights.init import load

SIDES = ("image", "text")


def linear(f: Map, width: int) -> tuple[np.ndarray, np.ndarray]:
  """The kernel [D, E] and the bias [E] of an affine map of rows [N, D].

  >>> kernel, bias = linear(lambda x: (x - 1) @ np.array([[2.0], [3.0]]), 2)
  >>> kernel.tolist(), bias.tolist()
  ([[2.0], [3.0]], [-5.0])
  """
  bias = f(np.zeros((1, width)))[0]
  return f(np.eye(width)) - bias, bias


def write_run(
  values: Any,
  stores: Mapping[str, str],
  maps: tuple[Map, Map],
  folder: pathlib.Path,
  about: Mapping[str, Any],
) -> None:
  """Writes a run with one checkpoint at step 0, which evaluate, export and bigalign.load read.

  Args:
    values: a config; its `model` names the towers, and its projectors become linear ones.
    stores: {"image" and "text": folder} that the maps were fitted to.
    maps: of both sides into a common space.
    folder: of the run; new or empty.
    about: how the maps were made, for the record.

  Raises:
    ValueError: if the towers of the config are not those of the stores.
  """
  opened = {side: reader.Store(stores[side]) for side in SIDES}
  maps_by_side = {side: linear(f, opened[side].width) for side, f in zip(SIDES, maps)}
  projector = dict(name="linear", bias=True)
  model = dict(
    embed_dim=maps_by_side["image"][0].shape[1], image_projector=projector, text_projector=projector
  )
  values = without_stores(values) | dict(
    model=written_model(values) | model, stages=(), ema=0.0, frozen=""
  )
  config = resolve_config(values)
  program = make_program(config, dataset_size=1)
  mesh = sharding.make_mesh()
  shapes, shardings = layout(program, mesh, config.rules)
  params: dict[str, Any] = dict(load(values, shapes.trainable, shardings.trainable))
  for side, (kernel, bias) in maps_by_side.items():
    prefix = f"model/{side}_projector/out"
    params |= {f"{prefix}/kernel": kernel, f"{prefix}/bias": bias}
  scalars, _ = program.loss.init(program.sizes)
  params = {**tree.flatten(scalars, "loss/"), **params}
  missing = sorted(program.params.keys() - params.keys())
  if missing:
    raise ValueError(
      f"config.model: {len(missing)} arrays come from no checkpoint"
      f" ({tree.shown(missing, sep=', ', width=200)}); name that of the towers of the stores"
    )
  for side, store in opened.items():
    own = {
      path: jax.numpy.asarray(x).astype(compute_dtype(program.model, path))
      for path, x in params.items()
      if path.startswith(f"model/{side}_tower/")
    }
    if own:
      reader.check_header(store.folder, like_stored(store.folder, header(side, config, own)))
  record = dict(
    model=written_model(values), dataset_size=1, samples_seen=0, data="", closed_form=dict(about)
  )
  untrained.write_run(folder, config, params, record)
