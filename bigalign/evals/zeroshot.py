"""Zero-shot classification: class names in prompt templates instead of a trained head."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics

from bigalign import sharding, tree
from bigalign.data.files.patterns import expand_variables
from bigalign.data.sources.webdataset import read_classnames
from bigalign.evals.embed import Context, mean_embedder, open_data, over_mesh, tell_rejects

PROMPTS = {path.stem: path for path in sorted(pathlib.Path(__file__).parent.glob("prompts/*.json"))}
_SLOTS = ("{c}", "{}")  # CLIP_benchmark's and open_clip's mark for the name of the class


def read_lines(path: str, what: str, *, labels: bool = False) -> list[str]:
  """The strings of a .json list, or the lines of any other text file that are not blank.

  With `labels` their places are labels, and a blank line is an error.

  Raises:
    FileNotFoundError, ValueError: for a missing or empty file, or JSON that is not such a list.
  """
  file = pathlib.Path(expand_variables(path, what=what)).expanduser()
  if not file.is_file():
    raise FileNotFoundError(f"{what}={path!r}: there is no file {file}")
  text = file.read_text(encoding="utf-8")
  if file.suffix != ".json":
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if labels:
      lines = [*read_classnames(file)]
  else:
    lines = json.loads(text)
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
      keys = f" with the keys {sorted(lines)[:8]}" if isinstance(lines, dict) else ""
      raise ValueError(
        f"{what}={path!r} holds a {type(lines).__name__}{keys}; expected a list of strings"
      )
  if not lines:
    raise ValueError(f"{what}={path!r}: {file} holds no line")
  return lines


def read_templates(templates: str | Sequence[str], what: str = "templates") -> list[str]:
  """Templates by the name of one of our sets, from a file, or as they are.

  Raises:
    ValueError: for an unknown set, or a template without a place for the name of the class.
  """
  if not isinstance(templates, str):
    found = list(templates)
  elif templates in PROMPTS:
    found = read_lines(str(PROMPTS[templates]), what)
  elif pathlib.Path(templates).suffix in (".txt", ".json"):
    found = read_lines(templates, what)
  else:
    raise ValueError(
      f"{what}: unknown {templates!r}.{tree.nearest(templates, PROMPTS)} Known: {[*PROMPTS]},"
      " or a .txt or .json file"
    )
  for template in found:
    if not any(slot in template for slot in _SLOTS):
      raise ValueError(f"{what}: {template!r} has no {{c}} or {{}} for the name of the class")
  return found


def fill(template: str, name: str) -> str:
  """The prompt of one class; braces in the name stay what they are."""
  slot = next(slot for slot in _SLOTS if slot in template)
  return template.replace(slot, name)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerClass(clu_metrics.Metric):
  """Hits and samples of each class; computes the mean recall of the classes that occur."""

  hits: jax.Array  # [K]
  count: jax.Array  # [K]

  @classmethod
  def from_model_output(  # type: ignore[override]
    cls, *, top1: jax.Array, label: jax.Array, mask: jax.Array, classes: int, **_: Any
  ) -> PerClass:
    # A label outside of [0, K) matches no class, and is counted in none.
    member = (label[:, None] == jnp.arange(classes)[None]) & mask[:, None]  # [B, K]
    return cls(
      hits=jnp.sum(member & top1[:, None], axis=0, dtype=jnp.int32),
      count=jnp.sum(member, axis=0, dtype=jnp.int32),
    )

  def merge(self, other: PerClass) -> PerClass:
    return PerClass(hits=self.hits + other.hits, count=self.count + other.count)

  def compute(self) -> jax.Array:
    recall = self.hits / jnp.maximum(self.count, 1)
    return recall.sum() / jnp.maximum((self.count > 0).sum(), 1)


Hits = clu_metrics.Collection.create(
  top1=clu_metrics.Average.from_output("top1"),
  top5=clu_metrics.Average.from_output("top5"),
  mean_per_class_recall=PerClass,
  unlabelled=clu_metrics.Average.from_output("unlabelled"),
)


def measure(zimg: jax.Array, weights: jax.Array, label: jax.Array, valid: jax.Array) -> Any:
  """Hits of a batch: [B, E] images against [K, E] classes; samples that are not valid do not count.

  Of equal logits the earlier class comes first, as argmax has it; NaN is never a hit.
  """
  classes = len(weights)
  logits = jnp.einsum("be,ke->bk", zimg, weights, precision=jax.lax.Precision.HIGHEST)
  known = (label >= 0) & (label < classes)
  own = jnp.take_along_axis(logits, jnp.clip(label, 0, classes - 1)[:, None], axis=1)  # [B, 1]
  earlier = jnp.arange(classes)[None] < label[:, None]
  before = jnp.sum((logits > own) | ((logits == own) & earlier), axis=1)
  found = known & jnp.isfinite(own[:, 0])
  return Hits.single_from_model_output(
    top1=found & (before < 1),
    top5=found & (before < 5),
    unlabelled=~known,
    label=label,
    mask=valid,
    classes=classes,
  )


def class_weights(
  context: Context, *, classnames: Sequence[str], templates: Sequence[str], batch_size: int
) -> Callable[[Any], jax.Array]:
  """weigh(params) -> [K, E] on every device: the unit mean over a class's templates."""
  prompts = [fill(template, name) for name in classnames for template in templates]
  ids, mask = context.data.make_tokenizer().encode_batch(prompts)

  def embed(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    return context.embed_text(params, batch["ids"], batch["mask"])

  return mean_embedder(
    context, embed, dict(ids=ids, mask=mask), group=len(templates), batch_size=batch_size
  )


def zeroshot(
  context: Context,
  *,
  source: str,
  templates: str | Sequence[str] = "photos",
  classnames: str | None = None,
  batch_size: int = 256,
) -> Callable[[Any], dict[str, float]]:
  """Zero-shot classification of a labelled source.

  Args:
    source: what open_source reads.
    templates: one of our sets, a file of templates (.txt with one a line, or a .json list; {c} or
      {} stands for the name), or a sequence of them.
    classnames: a file with the names in the order of the labels; those of the source if None.
    batch_size: images at a time, over all devices; rounded up to fit the mesh.

  Returns:
    run(params) -> {"val/<name>-zeroshot-val-top1": fraction, ...}; top5 from five classes on.

  Raises:
    ValueError: for a source without class names or with labels outside of them.
  """
  where = f"config.evals.{context.name}"
  data = open_data(context, source, batch_size=batch_size, captions=0)
  names = (
    list(getattr(data.source, "classnames", ()))
    if classnames is None
    else read_lines(classnames, f"{where}.classnames", labels=True)
  )
  if not names:
    raise ValueError(
      f"{where}: the source {source!r} comes without class names (no classnames.txt beside its"
      " shards); set classnames to a file with one name per line, in the order of the labels"
    )
  weigh = class_weights(
    context,
    classnames=names,
    templates=read_templates(templates, f"{where}.templates"),
    batch_size=batch_size,
  )

  whole = sharding.replicated_sharding(context.mesh)

  @functools.partial(jax.jit, out_shardings=whole)
  def count(zimg: jax.Array, weights: jax.Array, batch: dict[str, jax.Array]) -> Any:
    hits = measure(zimg, weights, batch["label"], batch["valid"])
    return hits, batch["rejects"].sum(0)

  @functools.partial(jax.jit, out_shardings=whole)
  def add(a: Any, b: Any) -> Any:
    return a[0].merge(b[0]), a[1] + b[1]

  def run(params: Any) -> dict[str, float]:
    weights = weigh(params)
    total: Any = None
    for batch in over_mesh(context, data):
      zimg = context.embed_image(params, batch["image"])
      kept = {name: batch[name] for name in ("label", "valid", "rejects")}
      counted = sharding.block_on_cpu(count(zimg, weights, kept))
      total = counted if total is None else sharding.block_on_cpu(add(total, counted))
    hits, rejects = jax.tree.map(np.asarray, total)
    rejected = tell_rejects(context.name, rejects)
    samples = int(hits.top1.count)
    if not samples:
      raise ValueError(
        f"{where}.source={source!r}: all {rejected} samples are rejected; the log gives the reasons"
      )
    values = {name: float(value) for name, value in hits.compute().items()}
    unlabelled = int(hits.unlabelled.total)
    del values["unlabelled"]
    if unlabelled:
      raise ValueError(
        f"{where}.source={source!r}: {unlabelled} of {samples} samples have no label or one that is"
        f" outside of the {len(names)} class names ({names[0]!r} ... {names[-1]!r})"
      )
    if len(names) < 5:
      del values["top5"]
    values |= {"num_samples": samples, "num_classes": len(names)}
    if rejected:
      values["rejected"] = rejected
    return {f"val/{context.name}-zeroshot-val-{name}": value for name, value in values.items()}

  return run
