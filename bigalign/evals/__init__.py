"""Evaluators by name: factories of run(params) -> {metric: number}, over the whole mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from bigalign import config
from bigalign.evals import geometry, glyphs, retrieval, zeroshot
from bigalign.evals.embed import Context

__all__ = ["EVALS", "Context", "make_evaluators"]

Evaluator = Callable[[Any], dict[str, float]]

EVALS: dict[str, Callable[..., Evaluator]] = dict(
  retrieval=retrieval.retrieval,
  zeroshot=zeroshot.zeroshot,
  glyphs=glyphs.glyphs,
  geometry=geometry.geometry,
)


def make_evaluators(
  evals: Mapping[str, Mapping[str, Any]],
  *,
  embed_image: Callable[..., Any],
  embed_text: Callable[..., Any],
  mesh: Mesh,
  data: Mapping[str, Any],
) -> dict[str, Evaluator]:
  """{name: run} for config.evals, {name: dict(type="retrieval", ...options of its factory)}.

  The sources are opened here, so that what is missing is said before the first step.

  Args:
    embed_image, embed_text, mesh, data: see Context.

  Raises:
    ValueError, TypeError: for an unknown type or option; they name the known ones.
  """
  made = {}
  for name, options in evals.items():
    options, where = dict(options), f"config.evals.{name}"
    factory = config.choose(EVALS, options.pop("type", "(absent)"), f"{where}.type")
    context = Context(name, embed_image, embed_text, mesh, data)
    made[name] = config.call(factory, options, where, context=context)
  return made
