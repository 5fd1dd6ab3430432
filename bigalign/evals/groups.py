"""Accuracy per group of images, such as the region that they come from; the worst, and the gap.

WILDS (https://arxiv.org/abs/2012.07421) and DataComp report the worst group of FMoW, GeoDE and
Dollar Street.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigalign import tree
from bigalign.data.samples import members
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources import base
from bigalign.evals.embed import places

MOST = 1000  # groups; a field with more different values is refused


class Groups(NamedTuple):
  """The groups of the samples of a source.

  Attributes:
    names: of G groups.
    number: [S] int32, the group of each sample; -1 for none.
    without: names of groups that the worst group and the gap leave out.
    where: the evaluator, for errors.
    field: that holds the groups.
  """

  names: tuple[str, ...]
  number: np.ndarray
  without: tuple[str, ...]
  where: str
  field: str

  def hits(
    self, scores: jax.Array, label: jax.Array, index: jax.Array, valid: jax.Array
  ) -> jax.Array:
    """[G + 1, 3] int32: of each group, then of the samples without one, top1, top5 and samples.

    Args:
      scores: [B, K].
      label: [B] int32.
      index: [B] int32, positions in the source.
      valid: [B] bool.
    """
    classes = scores.shape[1]
    known = (label >= 0) & (label < classes)
    before = places(scores, jnp.clip(label, 0, classes - 1))
    found = jnp.stack([known & (before < 1), known & (before < min(5, classes)), valid], 1)
    last = len(self.number) - 1
    group = jnp.asarray(self.number)[jnp.minimum(index, last)] % (len(self.names) + 1)
    member = (group[:, None] == jnp.arange(len(self.names) + 1)[None]) & valid[:, None]
    counts: jax.Array = jnp.sum(member[:, :, None] & found[:, None], axis=0, dtype=jnp.int32)
    return counts

  def metrics(self, counts: np.ndarray, classes: int) -> dict[str, float]:
    """{metric: value}; groups of which no image is used have none.

    Args:
      counts: [G + 1, 3], the sum of `hits`.
      classes: K; below five there is no top5.

    Raises:
      ValueError: for samples without a group.
    """
    *every, (_, _, missing) = counts.tolist()
    if missing:
      raise ValueError(
        f"{self.where}.groups={self.field!r}: {missing} of {int(counts[:, 2].sum())} samples have"
        " no such value"
      )
    values: dict[str, float] = {}
    for place, metric in enumerate(("top1", "top5") if classes >= 5 else ("top1",)):
      shares = {
        name: hits[place] / hits[2] for name, hits in zip(self.names, every, strict=True) if hits[2]
      }
      values |= {f"group_{name}-{metric}": share for name, share in shares.items()}
      ranked = [share for name, share in shares.items() if name not in self.without]
      if ranked:
        values[f"worst_group_{metric}"] = min(ranked)
        values[f"group_gap_{metric}"] = max(ranked) - min(ranked)
    sizes = {f"group_{name}-num_samples": hits[2] for name, hits in zip(self.names, every)}
    return values | {name: size for name, size in sizes.items() if size}


def read_groups(source: Any, field: str, without: Sequence[str], where: str) -> Groups:
  """Reads the group of each sample; decodes no image.

  Args:
    source: the samples.
    field: of the group: "json.region", a column, or "npy.0" for a number of KEY.npy. A value is a
      text, or a whole number.
    without: names of groups that are ranked no further.
    where: the evaluator, for errors.

  Raises:
    ValueError: if no sample has such a value, for more than MOST values, and for a name in
      `without` that no sample has.
  """
  values = [_value(source, i, field) for i in range(len(source))]
  names = sorted({x for x in values if x is not None}, key=lambda x: (x.zfill(9), x))
  if not names:
    raise ValueError(f"{where}.groups={field!r}: no sample has such a value")
  if len(names) > MOST:
    raise ValueError(
      f"{where}.groups={field!r} has {len(names):,} different values; groups are at most {MOST:,}"
    )
  if unknown := [name for name in without if name not in names]:
    raise ValueError(
      f"{where}.groups_without: no sample has {tree.shown(unknown)}; groups: {tree.shown(names)}"
    )
  number = {name: i for i, name in enumerate(names)}
  numbers = [-1 if x is None else number[x] for x in values]
  return Groups(tuple(names), np.array(numbers, np.int32), tuple(without), where, field)


def _value(source: Any, i: int, field: str) -> str | None:
  """The value of a sample as text; None if it has none."""
  try:
    start, _, place = field.rpartition(".")
    if start.endswith("npy") and place.isdecimal():
      data = base.value(source, i, start)
      array = np.load(io.BytesIO(data), allow_pickle=False) if isinstance(data, bytes) else data
      value: Any = None if array is None else np.ravel(array)[int(place)].item()
    else:
      value = base.value(source, i, field)
  except (Rejected, IndexError):  # an unreadable sample is counted when the batches are made
    return None
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, bool | int) or (isinstance(value, float) and value.is_integer()):
    return str(int(value))
  texts = members.strings(value)
  return texts[0] if len(texts) == 1 else None
