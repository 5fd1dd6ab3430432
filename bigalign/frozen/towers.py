"""Frozen towers: ready to embed, and what tells their vectors from those of others."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from bigalign import sharding, tree
from bigalign import state as states
from bigalign.data.stores import reader
from bigalign.evals.embed import to_host
from bigalign.run.provenance import digest
from bigalign.weights import init as beginnings

_SAME = ("remat", "scan", "attention", "init", "fresh", "drop")  # no matter for the vectors


class Towers(NamedTuple):
  """The frozen towers of a config, ready to embed.

  run: {side: (input arrays) -> [B, D] float32, or [B, 1 + T, D] with tokens}.
  headers: {side: what tells its vectors apart}.
  """

  mesh: jax.sharding.Mesh
  run: dict[str, Callable[..., jax.Array]]
  headers: dict[str, dict[str, Any]]


def load_towers(
  config: Mapping[str, Any],
  sides: Sequence[str],
  dataset_size: int,
  *,
  dtype: str,
  projected: bool = False,
  tokens: bool = False,
) -> Towers:
  """The towers of a config as they were pretrained; its durations may be epochs of a dataset.

  projected: with their projectors, which come from a checkpoint too.
  tokens: with each token.

  Raises:
    ValueError: for arrays that come from no checkpoint; for tokens of projected vectors.
  """
  if projected and tokens:
    raise ValueError("--projected and --tokens: a projector makes one vector of all tokens")
  model = beginnings.options(config["model"])
  program = states.make_program(**{**config, "model": model}, dataset_size=dataset_size)
  mesh = sharding.make_mesh()
  shapes, placed = states.layout(program, mesh, config.get("rules", sharding.RULES))
  abstract, places = ({**x.trainable, **x.frozen} for x in (shapes, placed))
  loaded = beginnings.load(config["model"], config["loss"], abstract, places)
  run, headers = {}, {}
  for side in sides:
    parts = (f"model/{side}_tower/", f"model/{side}_projector/")[: 1 + projected]
    paths = [path for path in abstract if path.startswith(parts)]
    new = [path for path in paths if path not in loaded]
    if new or not paths:
      raise ValueError(
        f"config.model.{side}: {len(new)} of its {len(paths)} arrays come from no checkpoint"
        f" ({', '.join(new[:3])} …), and a tower that nobody trained makes no useful vectors; name"
        f" a checkpoint in config.model.{side}.init, or leave it out with --towers"
      )
    params = {
      path: loaded[path].astype(states.compute_dtype(program.model, path)) for path in paths
    }
    method = ("embed_" if projected else "with_tokens_" if tokens else "pooled_") + side
    run[side] = _runner(program.model, method, params, sharding.batch_sharding(mesh))
    inputs = _inputs(program.spec, side)
    *rows, width = jax.eval_shape(run[side], *inputs).shape[1:]
    headers[side] = header(side, config["data"], model, params, projected=projected) | dict(
      width=width, dtype=dtype, tokens=rows[0] - 1 if rows else 0
    )
  return Towers(mesh, run, headers)


def _inputs(spec: Mapping[str, Any], side: str) -> list[jax.ShapeDtypeStruct]:
  names = ("image",) if side == "image" else ("text", "text_mask")
  return [jax.ShapeDtypeStruct(*spec[name]) for name in names]


def _runner(
  model: Any, method: str, params: Mapping[str, jax.Array], rows: jax.sharding.NamedSharding
) -> Callable[..., jax.Array]:
  @functools.partial(jax.jit, out_shardings=rows)
  def apply(params: Any, *inputs: jax.Array) -> jax.Array:
    variables = {"params": tree.unflatten(tree.subtree(params, "model/"))}
    found: jax.Array = model.apply(variables, *inputs, method=method)
    return found

  return functools.partial(apply, dict(params))


def header(
  side: str,
  data: Mapping[str, Any],
  model: Mapping[str, Any],
  params: Mapping[str, jax.Array],
  *,
  projected: bool = False,
) -> dict[str, Any]:
  """What vectors depend on: the tower, its parameters as they are used, and what is before it."""
  weights = hashlib.sha256()
  for path in sorted(params):
    array = to_host(params[path])
    weights.update(f"{path} {array.dtype} {array.shape}".encode() + array.tobytes())
  tower = {k: v for k, v in model[side].items() if k not in _SAME}
  before = (
    dict(
      image_size=data["image_size"],
      resize=data.get("resize", "squash"),
      apply_exif=data.get("apply_exif", False),
      pixels=model.get("pixels", "half"),
    )
    if side == "image"
    else dict(tokenizer=digest(data["tokenizer"]))
  )
  return dict(
    side=side, tower=tower, projected=projected, weights=weights.hexdigest()[:32], **before
  )


def check_stores(
  sides: Mapping[str, Sequence[reader.Store]],
  config: Mapping[str, Any],
  program: states.Program,
  state: states.State,
) -> None:
  """Whether the stores of each side hold what the towers of a run would make.

  Raises:
    ValueError: if they hold other vectors; if a tower would learn; if the loss reads tokens.
  """
  model, data = config["model"], config["data"]
  towers = tuple(f"model/{side}_tower/" for side in sides)
  learning = [path for path in state.trainable if path.startswith(towers)]
  if learning:
    frozen = f"{'' if len(sides) == 2 else next(iter(sides))}_tower/"
    raise ValueError(
      f"config.data.stores: {learning[0]} and {len(learning) - 1} other arrays of"
      " towers would learn nothing from stored vectors; set"
      f" config.frozen={frozen!r}"
    )
  every = [one for some in sides.values() for one in some]
  held = {"tokens"} if all(one.header.get("tokens") for one in every) else set()
  held |= {"labels"} if set(sides) == {"text"} else set()
  missing = sorted(program.loss.needs & {"tokens", "labels"} - held)
  if missing:
    raise ValueError(f"config.loss reads {missing[0]}, which config.data.stores does not hold")
  for side, some in sides.items():
    params = {p: x for p, x in state.frozen.items() if p.startswith(f"model/{side}_tower/")}
    expected = (
      header(side, data, model, params)
      if params
      else dict(width=getattr(program.model, f"{side}_tower").options.token_width)
    )
    for found in some:
      reader.check_header(found.folder, expected)
