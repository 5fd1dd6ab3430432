"""Writes a self-contained HTML page of a run: bigalign report runs/quickstart."""

from __future__ import annotations

import dataclasses
import pathlib
import string
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from bigalign.captions import Written, of_run
from bigalign.config import Config
from bigalign.data.files.draws import draw
from bigalign.data.files.patterns import expand_variables
from bigalign.data.loader import evaluation
from bigalign.data.sources.base import name_classes, open_source
from bigalign.evals import make_evaluators
from bigalign.evals.chance import chance
from bigalign.evals.confusion import Confusion
from bigalign.evals.embed import Context, EvalData, embedder, to_host
from bigalign.evals.segmentation import Segmented
from bigalign.evals.zeroshot import Zeroshot, read_label_sets, read_lines
from bigalign.evaluate import Run, open_run
from bigalign.report import sections
from bigalign.report.sections import Pairs, Rows
from bigalign.run import errors, parsers, runtime
from bigalign.run.metrics import read_metrics
from bigalign.towers.features import FeaturesOptions

FILE = "report.html"
SAMPLES = 512  # held-out pairs that are embedded for the figures
CLASSIFIED = 50_000  # images of a source whose confused classes are shown, at most


class _Picked:
  """Some samples of a source with one caption each: the first, or the name of the class."""

  def __init__(self, source: Any, indices: np.ndarray, names: Sequence[str] = ()):
    self._source, self._indices = source, indices
    self._names = tuple(names) or getattr(source, "classnames", ())
    self.fingerprint = source.fingerprint

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, i: int) -> dict[str, Any]:
    record = self._source[int(self._indices[i])]
    captions = record["captions"] or self._named(record)
    return {**record, "captions": captions[:1]}

  def _named(self, record: Mapping[str, Any]) -> tuple[str, ...]:
    """The name of the class of a sample, or the names of its classes; () without any."""
    if "label_set" in record:
      names = [name for name, has in zip(self._names, record["label_set"]) if has]
      return (", ".join(names),) if names else ()
    return self._names[record["label"] :][:1] if record["label"] >= 0 else ()


def held_out(config: Config) -> tuple[str, Sequence[str] | None, str]:
  """(source, caption fields, a description) of the samples that the config evaluates on."""
  default = config.data.caption_fields
  for name, evaluator in config.evals.items():
    if evaluator.name != "glyphs" and not evaluator.option("source"):  # it reads stores
      continue
    if evaluator.name == "glyphs":
      return (
        f"glyphs:{evaluator.option('split')}",
        None,
        "characters that training shows in no font",
      )
    if evaluator.name in ("retrieval", "geometry"):
      spoken = evaluator.option("languages") if evaluator.name == "retrieval" else None
      given = [*spoken.values()] if isinstance(spoken, Mapping) else evaluator.option("fields")
      fields = given or default
      return evaluator.option("source"), fields, f"held-out samples of config.evals.{name}"
    if evaluator.name == "zeroshot":
      return evaluator.option("source"), default, f"held-out samples of config.evals.{name}"
  return config.data.sources[0], default, "TRAINING samples: config.evals names no source"


def _classnames(config: Config) -> list[str]:
  """The names of the classes of `held_out`, if a zero-shot evaluator gives them in a file."""
  for name, evaluator in config.evals.items():
    if evaluator.name == "zeroshot" and (given := evaluator.option("classnames")) is not None:
      where = f"config.evals.{name}.classnames"
      return [] if read_label_sets(given, where) else read_lines(given, where, labels=True)
    if evaluator.name in ("glyphs", "retrieval", "geometry", "zeroshot"):
      break
  return []


def embed_pairs(run: Run) -> Pairs:
  """Up to SAMPLES pairs, drawn from what the run's config evaluates on.

  Raises:
    FileNotFoundError: if the data is not on this machine, or the model takes stored vectors.
  """
  for side in ("image", "text"):
    if isinstance(getattr(run.config.model, side), FeaturesOptions):
      raise FileNotFoundError(
        f"config.model.{side} is 'features', which takes stored vectors and embeds nothing new"
      )
  spec, fields, where = held_out(run.config)
  try:
    expand_variables(spec, what="source")
  except KeyError as error:  # a variable that is not set
    raise FileNotFoundError(errors.message(error)) from error
  source = open_source(spec, captions=fields, frames=run.config.data.frames is not None)
  names = _classnames(run.config)
  if names:
    name_classes(source, names)
  picked = _Picked(source, np.asarray(draw(len(source), SAMPLES)), names)
  size = len(jax.devices()) * 16
  data = dataclasses.replace(run.config.data, workers=0)  # a few hundred samples
  batches = list(
    evaluation.eval_batches(picked, data, batch_size=size, rows=np.arange(size), captions=1)
  )
  context = Context("report", mesh=run.mesh, data=data, **run.embed)
  with jax.set_mesh(run.mesh):
    embedded = embedder(context, EvalData(picked, size, lambda: batches))(run.params)
  valid = to_host(embedded.valid & embedded.texts_valid[:, :, 0]).reshape(-1)
  kept = np.flatnonzero(valid)
  if len(kept) < 2:
    raise ValueError(
      f"{spec!r}: only {len(kept)} of {len(picked)} samples can be used; the log gives the reasons"
    )
  images = [data.shown(batches[i // size], i % size) for i in kept.tolist()]
  zimg = to_host(embedded.zimg).reshape(len(valid), -1)[kept]
  ztxt = to_host(embedded.ztxt).reshape(len(valid), -1)[kept]
  captions = [picked[int(i)]["captions"][0] for i in kept]
  if run.ema:  # the result at the top of the page is that of the parameters too
    where += ", embedded by the parameters and not by their running averages"
  written: list[Written] = []
  if not data.naflex:  # squares of one size
    written = of_run(run.config, run.params, np.stack(images[: sections.SHOWN]))
  return Pairs(f"{len(kept)} {where}", images, captions, zimg, ztxt, written)


def _evaluators(run: Run, kind: str, what: str) -> Iterator[tuple[str, Any]]:
  """(name, evaluator) of each evaluator of one type in the run's config.

  One whose data is not on this machine is left out, with a warning.

  Args:
    run: the run.
    kind: type of the evaluators.
    what: the page would show of them, for the warning.
  """
  for name, component in run.config.evals.items():
    if component.name != kind:
      continue
    one = {name: component}
    try:
      evaluator = make_evaluators(one, mesh=run.mesh, data=run.config.data, **run.embed)[name]
    except (FileNotFoundError, KeyError) as error:
      if not errors.is_mistake(error):
        raise
      logging.warning("The page shows no %s of config.evals.%s: %s", what, name, error)
      continue
    yield name, evaluator


def segmented(run: Run) -> dict[str, Segmented]:
  """{name of an evaluator: images and their classes} of the segmentations of the run's config."""
  with jax.set_mesh(run.mesh):
    return {
      name: evaluator.examples(run.params, sections.SHOWN)
      for name, evaluator in _evaluators(run, "segmentation", "images")
    }


def confused(run: Run) -> dict[str, Confusion]:
  """{name of an evaluator: its confused classes} of the zero-shot classifications of the config.

  One that has more than CLASSIFIED images is left out, with a warning.
  """
  shown = {}
  for name, evaluator in _evaluators(run, "zeroshot", "classes"):
    if not isinstance(evaluator, Zeroshot):
      continue
    if evaluator.samples > CLASSIFIED:
      text = "The page shows no classes of config.evals.%s: more than %d images"
      logging.warning(text, name, CLASSIFIED)
      continue
    with jax.set_mesh(run.mesh):
      shown[name] = evaluator.confusion(run.params)
  return shown


def page(
  run: Run,
  rows: Rows,
  pairs: Pairs | str,
  segmentations: Mapping[str, Segmented] | None = None,
  confusions: Mapping[str, Confusion] | None = None,
) -> str:
  """The HTML of the page, which loads nothing from elsewhere.

  Args:
    run: the run.
    rows: of its metrics.jsonl.
    pairs: embedded samples, or why there are none.
    segmentations: of `segmented`.
    confusions: of `confused`.
  """
  values = sections.final(rows)
  guess = chance(values)
  body = "\n".join(
    (
      sections.header(run, rows),
      sections.headline(values, guess),
      sections.learning(rows, guess),
      sections.languages(values),
      sections.corruptions(values),
      sections.geometry_over_training(rows),
      *(
        (sections.absent(pairs),)
        if isinstance(pairs, str)
        else (sections.geometry(pairs), sections.retrieval(pairs), sections.captions(pairs))
      ),
      *(sections.segmentation(name, shown) for name, shown in (segmentations or {}).items()),
      *(sections.confusion(name, shown) for name, shown in (confusions or {}).items()),
      sections.throughput(rows),
      sections.everything(rows, values, guess),
      sections.details(run),
      f"<footer>bigalign {escape(run.meta['versions']['bigalign'])} ·"
      f" {escape(run.address or str(run.workdir))}</footer>",
    )
  )
  template = pathlib.Path(__file__).with_name("template.html").read_text(encoding="utf-8")
  return string.Template(template).substitute(title=escape(f"{run.name} · bigalign"), body=body)


def report(workdir: str | pathlib.Path, step: int | str = "latest") -> pathlib.Path:
  """Writes workdir/report.html and returns its local path.

  The page of a run in a bucket is uploaded too. The local copy would else be deleted by the next
  program that reads the run, because its folder then becomes equal to the bucket.

  Raises:
    FileNotFoundError: if the folder is not a run, or has no such checkpoint or no metrics.jsonl.
  """
  run = open_run(workdir, step)
  rows = [row for row in read_metrics(run.workdir) if row["step"] <= run.step]
  path = run.workdir / FILE
  pairs: Pairs | str
  try:
    pairs = embed_pairs(run)
  except FileNotFoundError as error:
    pairs = str(error)
    logging.warning("The page shows no samples: %s", pairs)
  path.write_text(page(run, rows, pairs, segmented(run), confused(run)), encoding="utf-8")
  if "://" in run.address:
    (epath.Path(run.address) / FILE).write_bytes(path.read_bytes())
  return path


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
  """The program; prints the path of the page."""
  args = parsers.report().parse_args(argv)
  runtime.setup()
  path = report(args.run, args.step)
  print(path)
  return path


def run() -> None:
  """The program `bigalign report`."""
  main()


if __name__ == "__main__":
  run()
