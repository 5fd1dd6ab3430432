"""Frozen towers: load them to embed, and identify their vectors in stores."""

from __future__ import annotations

import functools
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax

from bigalign import sharding, tree
from bigalign.config import Config, tokenizer_digest, tokenizer_files
from bigalign.data.files import checksums
from bigalign.data.image import naflex
from bigalign.data.stores import reader
from bigalign.evals.embed import to_host
from bigalign.options import Choose, plain, plain_value, resolve_value
from bigalign.program import Program, compute_dtype, layout, make_program
from bigalign.state import State
from bigalign.towers import TOWERS
from bigalign.weights.init import load

_SAME = ("remat", "scan", "attention", "init", "fresh", "drop")  # do not change the vectors


class Towers(NamedTuple):
  """The frozen towers of a config, ready to embed.

  mesh: the mesh. run: {side: (input arrays) -> [B, D] float32, or [B, 1 + T, D] with tokens}.
  headers: {side: header of its store, which identifies tower, parameters and preprocessing}.
  """

  mesh: jax.sharding.Mesh
  run: dict[str, Callable[..., jax.Array]]
  headers: dict[str, dict[str, Any]]


def load_towers(
  values: Mapping[str, Any],
  config: Config,
  sides: Sequence[str],
  dataset_size: int,
  *,
  dtype: str,
  projected: bool = False,
  tokens: bool = False,
) -> Towers:
  """The pretrained towers of a config.

  Args:
    values: the config as written, which names the checkpoints.
    config: the resolved config.
    sides: of "image" and "text".
    dataset_size: samples of an epoch, for durations in epochs.
    dtype: of the vectors.
    projected: with their projectors, which come from a checkpoint too.
    tokens: with each token.

  Raises:
    ValueError: for parameters that come from no checkpoint; for tokens of projected vectors.
  """
  if projected and tokens:
    raise ValueError("--projected and --tokens: a projector makes one vector of all tokens")
  program = make_program(config, dataset_size=dataset_size)
  mesh = sharding.make_mesh()
  state_shapes, state_shardings = layout(program, mesh, config.rules)
  shapes, shardings = ({**x.trainable, **x.frozen} for x in (state_shapes, state_shardings))
  loaded = load(values, shapes, shardings)
  run, headers = {}, {}
  for side in sides:
    parts = (f"model/{side}_tower/", f"model/{side}_projector/")[: 1 + projected]
    paths = [path for path in shapes if path.startswith(parts)]
    new = [path for path in paths if path not in loaded]
    if new or not paths:
      raise ValueError(
        f"config.model.{side}: {len(new)} of its {len(paths)} arrays come from no checkpoint"
        f" ({tree.shown(new, sep=', ', width=200)}), so its vectors would be random; name"
        f" a checkpoint in config.model.{side}.init, or leave it out with --towers"
      )
    params = {path: loaded[path].astype(compute_dtype(program.model, path)) for path in paths}
    method = ("embed_" if projected else "with_tokens_" if tokens else "pooled_") + side
    run[side] = _runner(program.model, method, params, sharding.batch_sharding(mesh))
    inputs = _inputs(program.spec, side)
    *rows, width = jax.eval_shape(run[side], *inputs).shape[1:]
    headers[side] = header(side, config, params, projected=projected) | dict(
      width=width, dtype=dtype, tokens=rows[0] - 1 if rows else 0
    )
  return Towers(mesh, run, headers)


def _inputs(spec: Mapping[str, Any], side: str) -> list[Any]:
  shapes = {name: jax.ShapeDtypeStruct(*x) for name, x in spec.items()}
  if side == "image":
    return [naflex.of_fields(shapes)]
  return [shapes[name] for name in ("text", "text_mask")]


def _runner(
  model: Any, method: str, params: Mapping[str, jax.Array], rows: jax.sharding.NamedSharding
) -> Callable[..., jax.Array]:
  @functools.partial(jax.jit, out_shardings=rows)
  def apply(params: Any, *inputs: jax.Array) -> jax.Array:
    variables = {"params": tree.unflatten(tree.subtree(params, "model/"))}
    vectors: jax.Array = model.apply(variables, *inputs, method=method)
    return vectors

  return functools.partial(apply, dict(params))


def header(
  side: str, config: Config, params: Mapping[str, jax.Array], *, projected: bool = False
) -> dict[str, Any]:
  """What vectors depend on: the tower, its parameters as they are used, and its preprocessing."""
  weights = hashlib.sha256()
  for path in sorted(params):
    array = to_host(params[path])
    weights.update(f"{path} {array.dtype} {array.shape}".encode() + array.tobytes())
  before = (
    dict(**config.data.preprocessing(), pixels=config.model.pixels)
    if side == "image"
    else dict(tokenizer=tokenizer_digest(config), tokenizer_files=tokenizer_files(config))
  )
  return dict(
    side=side,
    tower=_tower(plain(config.model)[side]),
    projected=projected,
    weights=weights.hexdigest()[:32],
    **before,
  )


def _tower(given: Mapping[str, Any]) -> dict[str, Any]:
  """A tower's options with every default, without those that do not change its vectors."""
  kind = Annotated[Any, Choose(TOWERS)]
  kept = {name: value for name, value in given.items() if name not in _SAME}
  filled = plain_value(kind, resolve_value(kind, kept, "header.json: tower"))
  return {name: value for name, value in filled.items() if name not in _SAME}


def like_stored(folder: pathlib.Path, expected: Mapping[str, Any]) -> dict[str, Any]:
  """A header whose tower is written like that of an existing store, if both mean the same.

  A store that was written when an option did not exist, or by a config that gave fewer, has the
  default of that option. Older stores do not say what files next to the tokenizer gave.
  """
  path = folder / "header.json"
  stored = checksums.read_json(path) if path.exists() else {}
  if stored and "tokenizer_files" not in stored:
    expected = {name: value for name, value in expected.items() if name != "tokenizer_files"}
  tower = stored.get("tower") or {}
  known = "tower" in expected and tower.get("name") in TOWERS
  if known and _tower(tower) == expected["tower"]:
    return {**expected, "tower": tower}
  return dict(expected)


def check_stores(
  sides: Mapping[str, Sequence[reader.Store]],
  config: Config,
  program: Program,
  state: State,
) -> None:
  """Whether the stores of each side hold what the towers of a run would make.

  Raises:
    ValueError: if they hold other vectors; if a tower would learn; if the loss reads tokens.
  """
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
  # With stores of one side the source has the labels.
  labelled = len(sides) == 1 or all(one.has_labels for one in sides["image"])
  held |= {"labels"} if labelled else set()
  missing = sorted(program.loss.needs & {"tokens", "labels"} - held)
  if missing:
    raise ValueError(f"config.loss reads {missing[0]}, which config.data.stores does not hold")
  for side, some in sides.items():
    params = {p: x for p, x in state.frozen.items() if p.startswith(f"model/{side}_tower/")}
    expected = (
      header(side, config, params)
      if params
      else dict(width=getattr(program.model, f"{side}_tower").options.token_width)
    )
    for found in some:
      reader.check_header(found.folder, like_stored(found.folder, expected))
