"""Opens the checkpoint of a run and runs evaluators on it."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import rich.box
import rich.table
from absl import logging

from bigalign import sharding, stages
from bigalign.config import (
  Config,
  recorded_config,
  tokenizer_digest,
  tokenizer_files,
  with_tokenizer_digest,
)
from bigalign.evals import Evaluator, make_evaluators
from bigalign.evals.chance import chance
from bigalign.evals.embed import SharedImages
from bigalign.options import plain
from bigalign.program import layout, make_embed, make_programs
from bigalign.run import errors
from bigalign.run.provenance import changed_ids, check_hosts_agree, read_config
from bigalign.run.workdir import Workdir
from bigalign.state import restore_params

_ZEROSHOT = "zeroshot (--zeroshot)"  # as Python and the command line name it


class Run(NamedTuple):
  """A run at one step, on this machine's mesh.

  workdir: its local folder. step: of the checkpoint. config: as it was trained, except that options
  that name small files, such as the tokenizer, name the copies in the folder of the run. meta: the
  JSON of the checkpoint (config with the paths as written, revision, versions, samples_seen,
  dataset_size ...). params: all parameters by path. ema: the same with running averages, empty if
  the run has none. embed: as of program.make_embed. address: of the folder, local or
  gs://…; "": workdir.
  """

  workdir: pathlib.Path
  step: int
  config: Config
  meta: dict[str, Any]
  mesh: jax.sharding.Mesh
  params: dict[str, jax.Array]
  ema: dict[str, jax.Array]
  embed: dict[str, Any]
  address: str = ""

  @property
  def name(self) -> str:
    """The name of the run's folder, local or in a bucket."""
    return self.address.rpartition("/")[2] or self.workdir.name


def open_run(workdir: str | pathlib.Path, step: int | str = "latest") -> Run:
  """Reads a run's config and the parameters of a checkpoint; changes nothing in the run.

  Args:
    workdir: folder of the run, local or gs://….
    step: a number, "latest" or "best" (of config.keep.best).

  Raises:
    FileNotFoundError: for a folder that is not a run, or a step without a checkpoint.
    ValueError: for "best" in a run whose config.keep.best is not set.
  """
  folder = Workdir(workdir, reader=True)
  folder.download()
  record = read_config(folder.local)
  if record is None:
    raise FileNotFoundError(
      f"{folder.root} holds no config.json, so it is not the --workdir of a training run"
    )
  keep = recorded_config(record).keep
  if step == "best" and not keep.option("best"):
    raise ValueError(
      f"{folder.local}: config.keep.best names no metric, so no checkpoint is the best"
    )
  checkpoints = keep.make(workdir=folder.root, read_only=True)
  number = checkpoints.find(step)
  meta = checkpoints.meta(number)
  recorded, config = recorded_config(meta), recorded_config(meta, folder.local)
  _warn_of_tokenizer(meta, recorded, config, folder.local)
  for line in meta.get("differences", ()):  # from the checkpoint with which the run began
    logging.warning("%s", line)
  meta["config"] = plain(recorded)
  size = meta["dataset_size"]
  stage = stages.at(stages.split(config, dataset_size=size), number)
  programs = make_programs(config, dataset_size=size)
  program, own = programs[-1], programs[stage.number]
  # The losses of the checkpoint; one of weight 0 is not a part of them.
  losses = {name: x for name, x in stage.config.loss.items() if x.option("weight")}
  config = dataclasses.replace(config, loss=losses)
  # The machine may differ from the one that trained: the model is replicated on all its devices.
  mesh = sharding.make_mesh()
  shapes, shardings = layout(own, mesh, config.rules)
  read = functools.partial(restore_params, checkpoints, number, shapes, shardings, own.fixed)
  params, ema = read(), read(ema=True) if own.ema else {}
  checkpoints.close()
  embed = make_embed(program.model, config.loss)
  return Run(folder.local, number, config, meta, mesh, params, ema, embed, str(folder.root))


def _warn_of_tokenizer(
  meta: Mapping[str, Any], recorded: Config, config: Config, workdir: pathlib.Path
) -> None:
  """Logs that files of the tokenizer changed since the run was trained.

  Args:
    meta: of the checkpoint.
    recorded: its options, which name files of the machine that trained.
    config: the same, with the run's own copies of those files.
    workdir: the run's local folder.
  """
  try:
    changed = changed_ids(meta, {"tokenizer_files": tokenizer_files(config)})
    copied = config.data.tokenizer != recorded.data.tokenizer  # and so is unchanged
    if not copied and with_tokenizer_digest(meta)["tokenizer"] != tokenizer_digest(config):
      changed = changed or "config.data.tokenizer: its file has another content than in training"
  except (OSError, KeyError, ValueError, ImportError):  # whoever needs the tokenizer reports it
    return
  if changed:
    logging.warning(
      "%s: %s. Texts are embedded with the ids of the present files", workdir, changed
    )


def evaluate(run: Run, evals: Mapping[str, Any] | None = None) -> dict[str, float]:
  """{metric: value} of a run; those of the averaged parameters as "ema/…".

  Args:
    run: of open_run.
    evals: as config.evals: {name: options, type among them}, in plain values or resolved. None:
      those of the run's config; a warning names the ones whose data is not on this machine.

  Raises:
    FileNotFoundError: for missing data of `evals`; if it is None, without the data of any.
  """
  if evals is None:
    evaluators, _ = evaluators_with_data(run)
  else:
    evaluators = make_evaluators(evals, mesh=run.mesh, data=run.config.data, **run.embed)
  return measure(run, evaluators)


def measure(run: Run, evaluators: Mapping[str, Evaluator]) -> dict[str, float]:
  """{metric: value} of a run; those of the averaged parameters as "ema/…"."""
  metrics: dict[str, float] = {}
  with jax.set_mesh(run.mesh):
    for prefix, params in (("", run.params), ("ema/", run.ema)):
      for evaluator in evaluators.values() if params else ():
        metrics |= {prefix + name: value for name, value in evaluator(params).items()}
  return metrics


def evaluators_with_data(run: Run) -> tuple[dict[str, Evaluator], dict[str, str]]:
  """The evaluators of a run's config, and {name: reason} of those whose data is not here."""
  evaluators: dict[str, Evaluator] = {}
  missing: dict[str, str] = {}
  shared = SharedImages()
  for name, component in run.config.evals.items():
    one = {name: component}
    try:
      evaluators |= make_evaluators(
        one, mesh=run.mesh, data=run.config.data, shared=shared, **run.embed
      )
    except (FileNotFoundError, KeyError) as error:
      if not errors.is_mistake(error):
        raise
      missing[name] = errors.message(error)
  for name, reason in missing.items():
    logging.warning("config.evals.%s is left out: %s", name, reason)
  check_hosts_agree({"set of evaluators whose data is there": [*evaluators]})
  if missing and not evaluators:
    raise FileNotFoundError(
      f"The data of no evaluator of {run.workdir} is on this machine; give other data as retrieval"
      f" or zeroshot (--retrieval, --zeroshot). {'; '.join(missing.values())}"
    )
  return evaluators, missing


def zeroshot_folder(
  folder: str | pathlib.Path, option: str = _ZEROSHOT
) -> tuple[str, dict[str, Any]]:
  """The name and the evaluator's options of a CLIP_benchmark webdataset folder.

  The shards are in the folder or in its subfolder `test`; classnames.txt and
  zeroshot_classification_templates.txt are next to them or one level up. Without templates, our own
  are used.

  Raises:
    FileNotFoundError: if there is no folder, no shard or no classnames.txt.
    ValueError: for a folder in an object store.
  """
  if "://" in str(folder):
    raise ValueError(
      f"{option}={folder}: a folder on a disk or a mount. Shards in an object store can be named"
      ' in the config: config.evals.NAME = dict(type="zeroshot", source="gs://…/*.tar"), with'
      " classnames.txt next to them."
    )
  shards = _shards_in(folder, option)

  def find(name: str) -> list[pathlib.Path]:
    return [path / name for path in (shards, shards.parent) if (path / name).is_file()]

  classnames, templates = find("classnames.txt"), find("zeroshot_classification_templates.txt")
  if not classnames:
    raise FileNotFoundError(
      f"{option}={folder}: neither {shards} nor {shards.parent} holds a classnames.txt: one name"
      " per line, in the order of the labels"
    )
  options: dict[str, Any] = dict(
    type="zeroshot", source=str(shards / "*.tar"), classnames=str(classnames[0])
  )
  if templates:
    options["templates"] = str(templates[0])
  return classnames[0].parent.name, options


def retrieval_folder(folder: str | pathlib.Path, option: str) -> dict[str, Any]:
  """The evaluator's options of a CLIP_benchmark webdataset folder for retrieval.

  The shards are in the folder or in its subfolder `test`. If dataset_type.txt beside them or one
  level up says "retrieval", each line of a text is a caption.

  Raises:
    FileNotFoundError: if there is no folder or no shard.
  """
  shards = _shards_in(folder, option)
  return dict(type="retrieval", source=str(shards / "*.tar"), fields=("txt",))


def _shards_in(folder: str | pathlib.Path, option: str) -> pathlib.Path:
  """The folder with the shards of a CLIP_benchmark dataset: this one, or its subfolder `test`."""
  given = pathlib.Path(folder).expanduser().absolute()
  shards = next((x for x in (given, given / "test") if any(x.glob("*.tar"))), None)
  if shards is None:
    here = f"neither {given} nor {given / 'test'} holds shards (.tar)"
    problem = here if given.is_dir() else "there is no such folder"
    raise FileNotFoundError(f"{option}={folder}: {problem}")
  return shards


def data_evals(
  retrieval: str | None,
  fields: Sequence[str] | None,
  zeroshot: str | pathlib.Path | None,
  image_store: str = "",
  text_store: str = "",
  class_store: str = "",
) -> dict[str, dict[str, Any]]:
  """Evaluators of data that are given by hand, as in config.evals.

  Args:
    retrieval: a source, for retrieval.
    fields: of its captions; None: config.data.captions.
    zeroshot: folder of a CLIP_benchmark dataset.
    image_store, text_store: folders of vectors that take the place of the images or the captions
      of `retrieval`; both, without `retrieval`: of both sides.
    class_store: folder of the vectors of the prompts of the classes of `zeroshot`.
  """
  evals: dict[str, dict[str, Any]] = {}
  stores = dict(image_store=image_store, text_store=text_store)
  if retrieval or any(stores.values()):
    evals["val"] = dict(type="retrieval", source=retrieval or "", fields=fields, **stores)
  if zeroshot:
    name, options = zeroshot_folder(zeroshot)
    evals[name] = options | dict(class_store=class_store)
  elif class_store:
    raise ValueError(f"--class_store={class_store}: --zeroshot names the images of these classes")
  return evals


def table(metrics: Mapping[str, float]) -> rich.table.Table:
  """The metrics next to their chance level."""
  guess = chance({name.removeprefix("ema/"): value for name, value in metrics.items()})
  rows = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  rows.add_column("metric")
  rows.add_column("value", justify="right")
  rows.add_column("chance", justify="right", style="dim")
  for name, value in metrics.items():
    shown = f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
    by_chance = guess.get(name.removeprefix("ema/"))
    rows.add_row(name, shown, "" if by_chance is None else f"{by_chance:.4f}")
  return rows
