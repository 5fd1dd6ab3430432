"""What heads read: outputs of the towers for a part of the batch, and the towers themselves."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigalign import tree
from bigalign.losses import Loss, check_fields
from bigalign.losses.heads.base import Head, Hidden, Read, TeacherTower
from bigalign.model import DualEncoder, Teacher
from bigalign.private_apis import without_shape_checks
from bigalign.towers.base import TowerOutput

Arrays = Mapping[str, Any]


def heads(loss: Loss) -> dict[str, Head]:
  """{name: head} of the terms of a weighted sum that have layers of their own."""
  return {name: term.head for name, (_, term) in loss.terms.items() if term.head is not None}


def fields(loss: Loss) -> frozenset[str]:
  """The fields of the batch that the heads of a loss read, besides text and text_mask."""
  return frozenset().union(*(head.fields for head in heads(loss).values()))


def draws(
  loss: Loss, key: jax.Array, batch: Mapping[str, jax.Array], sizes: Mapping[str, Any]
) -> dict[str, jax.Array]:
  """{"<head>/<name>": [B, …]}, the random numbers of a step; one head does not change another's."""
  shapes = {name: x.shape for name, x in batch.items()}
  return {
    f"{name}/{drawn}": x
    for name, head in heads(loss).items()
    for drawn, x in head.draw(_key(key, name), shapes, sizes).items()
  }


def init(
  loss: Loss,
  key: jax.Array,
  model: DualEncoder,
  params: Arrays,
  feats: Mapping[str, jax.Array],
  part: Mapping[str, jax.Array],
  sizes: Mapping[str, Any],
  teacher: Teacher | None = None,
) -> dict[str, Any]:
  """The initial parameters of all heads by path, "heads/<loss>/…".

  Args:
    loss: a weighted sum.
    key: of the random parameters; each head has a key of its own.
    model: the towers.
    params: of the towers, by path.
    feats: what the towers make of `part`.
    part: fields of one row.
    sizes: as for Loss.init.
    teacher: config.teacher, if there is one.

  Raises:
    ValueError: for a field that a head reads and the batch lacks.
  """
  for name, head in heads(loss).items():
    check_fields(name, head, part)
  part = {**part, **draws(loss, key, part, sizes)}
  _, states = loss.init(sizes)
  found: dict[str, Any] = {}
  for name, head in heads(loss).items():
    read = _read(name, model, params, params, feats, part, sizes, states[name], teacher)
    found |= tree.flatten(head.init(_key(key, name), read), f"heads/{name}/")
  return found


def apply(
  loss: Loss,
  model: DualEncoder,
  params: Arrays,
  averaged: Arrays,
  feats: Mapping[str, jax.Array],
  part: Mapping[str, jax.Array],
  sizes: Mapping[str, Any],
  states: Mapping[str, Any],
  teacher: Teacher | None = None,
) -> dict[str, jax.Array]:
  """{"<head>/<name>": [b, …]}, the features of all heads; arguments as of `init`.

  Args:
    loss: a weighted sum.
    model: the towers.
    params: all parameters by path.
    averaged: the same, averaged where the run averages them.
    feats: what the towers make of `part`.
    part: fields of some rows, and their `draws`.
    sizes: as for Loss.init.
    states: of the loss before this step.
    teacher: config.teacher, if there is one.
  """
  averaged = jax.lax.stop_gradient(averaged)
  found: dict[str, Any] = {}
  for name, head in heads(loss).items():
    read = _read(name, model, params, averaged, feats, part, sizes, states[name], teacher)
    own, slow = (tree.unflatten(tree.subtree(x, f"heads/{name}/")) for x in (params, averaged))
    with jax.named_scope(name):
      rows = head.apply(own, slow, read)
    found |= {
      f"{name}/{key}": jax.lax.stop_gradient(x) if key in head.sums else x
      for key, x in rows.items()
    }
  return found


def sums(loss: Loss) -> frozenset[str]:
  """The names in the result of `apply` that have no batch axis and are added up over the batch."""
  return frozenset(f"{name}/{key}" for name, head in heads(loss).items() for key in head.sums)


def late(loss: Loss) -> frozenset[str]:
  """The names in the result of `apply` on whose values no gradient depends: see Head.late."""
  return sums(loss) | {f"{name}/{key}" for name, head in heads(loss).items() for key in head.late}


def _key(key: jax.Array, name: str) -> jax.Array:
  return jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))


def _read(
  name: str,
  model: DualEncoder,
  params: Arrays,
  averaged: Arrays,
  feats: Mapping[str, jax.Array],
  part: Mapping[str, jax.Array],
  sizes: Mapping[str, Any],
  state: Mapping[str, jax.Array],
  teacher: Teacher | None,
) -> Read:
  """What one head reads."""
  model = _of_any_size(model, part)

  def call(slow: bool, method: str, *args: Any, **options: Any) -> Any:
    variables = tree.unflatten(tree.subtree(averaged if slow else params, "model/"))
    with without_shape_checks():
      return model.apply({"params": variables}, *args, method=method, **options)

  def image(
    images: jax.Array,
    *,
    averaged: bool = False,
    hidden: Hidden | None = None,
    kept: jax.Array | None = None,
  ) -> TowerOutput:
    output: TowerOutput = call(averaged, "image_output", images, hidden=hidden, kept=kept)
    return jax.lax.stop_gradient(output) if averaged else output

  def text(ids: jax.Array, mask: jax.Array, *, averaged: bool = False) -> TowerOutput:
    output: TowerOutput = call(averaged, "text_output", ids, mask)
    return jax.lax.stop_gradient(output) if averaged else output

  def project(side: str, output: TowerOutput, *, averaged: bool = False) -> jax.Array:
    projected: jax.Array = call(averaged, f"project_{side}", output).astype(jnp.float32)
    return jax.lax.stop_gradient(projected) if averaged else projected

  def projected(output: TowerOutput | None = None, *, averaged: bool = False) -> jax.Array:
    if output is None:
      output = TowerOutput(feats["pooled_img"], feats["tokens_img"])
    patches: jax.Array = call(averaged, "projected_patches", output).astype(jnp.float32)
    return jax.lax.stop_gradient(patches) if averaged else patches

  def words() -> jax.Array:
    path = "model/text_tower/embedding"
    if path not in params:
      raise ValueError(
        f"config.loss.{name} reads the token table of the text tower, and"
        f" {type(model.text_tower).__name__} has none; choose config.model.text.name='text' or"
        " 'bert'"
      )
    table: jax.Array = jax.lax.stop_gradient(params[path].astype(jnp.float32))
    return table

  own = {**part, **tree.subtree(part, f"{name}/")}
  kept = jax.lax.stop_gradient(state)
  taught = _teacher(name, teacher, params, sizes["patch"])
  return Read(own, feats, image, text, project, sizes, kept, projected, words, taught)


def _teacher(name: str, teacher: Teacher | None, params: Arrays, patch: int) -> TeacherTower:
  """Read.teacher of the head of a loss."""

  def missing(*_: Any, **__: Any) -> jax.Array:
    raise ValueError(
      f"config.loss.{name} reads a frozen teacher; set config.teacher=dict(init=FOLDER)"
    )

  if teacher is None:
    return missing
  variables = {"params": tree.unflatten(tree.subtree(params, "teacher/"))}

  def tokens(
    images: jax.Array, *, hidden: jax.Array | None = None, projected: bool = False
  ) -> jax.Array:
    patches = images.shape[1] // patch if patch else 0
    with jax.named_scope("teacher"), without_shape_checks():
      found: Any = teacher.apply(variables, images, patches, hidden=hidden, projected=projected)
    return jax.lax.stop_gradient(jnp.asarray(found))

  return tokens


def _of_any_size(model: DualEncoder, part: Mapping[str, jax.Array]) -> DualEncoder:
  """The model with learned positions on the grid of the batch's images; views may have another."""
  tower = model.image_tower
  if getattr(tower, "grid", ()) is not None or "image" not in part:
    return model
  _, height, width, _ = part["image"].shape
  patch = tower.options.patch
  return model.clone(image_tower=tower.clone(grid=(height // patch, width // patch)))
