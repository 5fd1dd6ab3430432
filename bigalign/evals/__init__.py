"""Evaluators by name: each makes a function run(params) -> {metric: number} over the whole mesh."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from jax.sharding import Mesh

from bigalign.data.loader.options import DataOptions
from bigalign.evals import (
  associations,
  compositional,
  corruptions,
  geometry,
  glyphs,
  knn,
  probe,
  regions,
  retrieval,
  same_modality,
  segmentation,
  zeroshot,
)
from bigalign.evals.embed import Context, SharedImages
from bigalign.options import Choose, Component, resolve_value
from bigalign.towers.padding import UsedLengths, all_positions

__all__ = ["EVALS", "Context", "EvalOptions", "make_evaluators", "named_files"]

Evaluator = Callable[[Any], dict[str, float]]

EVALS: dict[str, Callable[..., Evaluator]] = dict(
  retrieval=retrieval.retrieval,
  image_retrieval=same_modality.image_retrieval,
  text_retrieval=same_modality.text_retrieval,
  zeroshot=zeroshot.zeroshot,
  glyphs=glyphs.glyphs,
  geometry=geometry.geometry,
  segmentation=segmentation.segmentation,
  compositional=compositional.compositional,
  associations=associations.associations,
  corruptions=corruptions.corruptions,
  region_retrieval=regions.region_retrieval,
  linear_probe=probe.linear_probe,
  few_shot=probe.few_shot,
  ridge=probe.ridge,
  knn=knn.knn,
)
_TRAINED = ("linear_probe", "few_shot", "ridge", "knn")  # on images with labels

EvalOptions = Mapping[str, Annotated[Component, Choose(EVALS, key="type", fixed=("context",))]]


def named_files(evals: Mapping[str, Component]) -> dict[tuple[str, str], pathlib.Path]:
  """{(name of an evaluator, option): file} of the options that name a file of texts.

  Raises:
    FileNotFoundError: for a missing file.
  """
  return {
    (name, option): zeroshot.text_file(path, f"config.evals.{name}.{option}")
    for name, component in evals.items()
    if component.name in ("zeroshot", "segmentation", "corruptions")
    for option, path in zeroshot.named_files(
      classnames=component.option("classnames"),
      templates=component.option("templates"),
      descriptions=component.option("descriptions") if component.name == "zeroshot" else "",
      frequency=component.option("frequency") if component.name == "zeroshot" else "",
    ).items()
  } | {
    (name, "classnames"): zeroshot.text_file(path, f"config.evals.{name}.classnames")
    for name, component in evals.items()
    if component.name in _TRAINED and (path := component.option("classnames")) is not None
  }


def make_evaluators(
  evals: Mapping[str, Any],
  *,
  embed_image: Callable[..., Any],
  embed_text: Callable[..., Any],
  mesh: Mesh,
  data: DataOptions,
  text_lengths: UsedLengths = all_positions,
  shared: SharedImages | None = None,
  embed_patches: Callable[..., Any] | None = None,
  image_output: Callable[..., Any] | None = None,
  logit_head: Callable[..., Any] | None = None,
) -> dict[str, Evaluator]:
  """Returns the evaluators {name: run} of config.evals.

  It opens the sources, so that a missing file is an error at the start of a run.

  Args:
    evals: {name: options, type among them}, in plain values or resolved.
    embed_image: embeds images, see Context.
    embed_text: embeds texts, see Context.
    mesh: to evaluate on.
    data: config.data.
    text_lengths: see Context.
    embed_patches: embeds the patches of images, see Context.
    image_output: gives the tokens of images, see Context.
    logit_head: gives the trained scale, see Context.
    shared: of evaluators made by other calls, to share images with them too. Images are shared
      while evaluators are called with the same object as parameters.

  Raises:
    ValueError, TypeError: for an unknown type or option; lists the known ones.
  """
  evaluators = {}
  shared = SharedImages() if shared is None else shared
  for name, component in resolve_value(EvalOptions, evals, "config.evals").items():
    context = Context(
      name,
      embed_image,
      embed_text,
      mesh,
      data,
      text_lengths,
      shared,
      embed_patches,
      image_output,
      logit_head,
    )
    evaluators[name] = component.make(context=context)
  return evaluators
