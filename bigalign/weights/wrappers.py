"""Checkpoints that were saved inside a wrapper: prefixes of keys, and numbers of another shape."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping

from absl import logging

from bigalign.weights import table
from bigalign.weights.files import Tensors
from bigalign.weights.layout import Layout

# Of torch's DataParallel, torch.compile, FSDP and activation checkpointing, at any depth.
_WRAPPER = re.compile(
  r"(?:(?<=^)|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# Names of a whole model inside another one.
_PREFIXES = (
  *("model.", "dinov2.", "dinov2_with_registers.", "dinov3.", "dinov3_vit.", "backbone."),
  *("net.", "clip.", "clip_model.", "siglip.", "siglip2.", "vit.", "encoder.", "auto_model."),
  *("bert.", "roberta.", "mpnet.", "0.auto_model.", "image_encoder.", "text_encoder."),
)


def unwrapped(tensors: Tensors) -> Tensors:
  """Returns the tensors without the components that torch's wrappers add to keys."""
  names = {key: _WRAPPER.sub("", key) for key in tensors}
  return _renamed(tensors, names)


def fitted(tensors: Tensors, make: Callable[[Tensors], Layout]) -> tuple[Tensors, Layout]:
  """Returns the tensors and their layout, without a prefix that hides the keys of the layout.

  Args:
    tensors: of the file.
    make: returns the layout for tensors; a ValueError if they do not fit.

  Raises:
    ValueError: of `make` for the tensors as they are, if no prefix helps.
  """
  problem: ValueError | None = None
  best: tuple[Tensors, Layout] | None = None
  lacking = math.inf
  for some in _candidates(tensors):
    try:
      layout = make(some)
    except ValueError as error:
      problem = problem or error
      continue
    missing = _missing(layout, some)
    if missing < lacking:
      best, lacking = (some, layout), missing
    if not missing:
      break
  if best is None:
    assert problem is not None
    raise problem
  if best[0] is not tensors:
    was = next(x for x in tensors if x not in best[0])
    logging.info("%s: read without the prefix of keys such as %s", tensors.path, was[:80])
  return best


def _candidates(tensors: Tensors) -> Iterator[Tensors]:
  """The tensors as they are, without one prefix, and without two, as in "model.dinov2."."""
  yield tensors
  inner = [tensors]
  for _ in range(2):
    outer, inner = inner, []
    for some in outer:
      for prefix in _PREFIXES:
        if any(key.startswith(prefix) for key in some):
          inner.append(_renamed(some, {x: x.removeprefix(prefix) for x in some}, log=False))
          yield inner[-1]


def with_scalars(tensors: Tensors, layout: Layout) -> Tensors:
  """Returns the tensors, the logit scale and bias in the layout's shape if they are one number."""
  shapes: dict[str, tuple[int, ...]] = {}
  for row in layout.rows:
    if row.ours in ("t", "b") and row.theirs in tensors:
      shape = tensors[str(row.theirs)].shape
      wanted = (1,) if row.rule else ()
      if math.prod(shape) == 1 and shape != wanted:
        shapes[str(row.theirs)] = wanted
        logging.info("%s: %s %s is read as one number", tensors.path, row.theirs, list(shape))
  return tensors.reshaped(shapes) if shapes else tensors


def _missing(layout: Layout, tensors: Tensors) -> int:
  """How many keys of the layout are missing."""
  rows = (row for row in layout.rows if not row.optional and row.ours not in ("t", "b"))
  return sum(key not in tensors for row in rows for key in table.keys(row))


def _renamed(tensors: Tensors, names: Mapping[str, str], *, log: bool = True) -> Tensors:
  """The tensors by their new names; the old ones if two would have the same name."""
  changed = [key for key, name in names.items() if key != name]
  if not changed or len(set(names.values())) < len(names) or "" in names.values():
    return tensors
  if log:
    example = f"{changed[0][:80]} as {names[changed[0]][:80]}"
    logging.info("%s: %d keys of a wrapper, %s", tensors.path, len(changed), example)
  return tensors.renamed(names)
