"""Associations of a cue with some of several images, as WinoGAViL asks for them.

https://arxiv.org/abs/2207.12576. The k images that resemble the cue most are chosen, where k is the
number of those that belong to it.
"""

from __future__ import annotations

import csv
import io
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigalign.data.files.lines import read_names, read_text
from bigalign.data.files.patterns import expand_variables
from bigalign.evals.compositional import Example, Files, Set, image_folder
from bigalign.evals.embed import (
  Context,
  embedded_images,
  log_rejects,
  read_data,
  texts_embedder,
  to_host,
)

_FIELDS = ("cue", "candidates", "associations")
_FEW, _MANY = 6, 10  # candidates: at most, and at least, of the two kinds that are reported


class Cue(NamedTuple):
  """A cue and its images.

  Attributes:
    text: the cue.
    candidates: names of images.
    chosen: [C] bool, those that belong to the cue.
  """

  text: str
  candidates: tuple[str, ...]
  chosen: np.ndarray


def jaccard(sims: np.ndarray, chosen: np.ndarray) -> float:
  """The share of the images that belong to the cue or are found, that do and are.

  Of equal similarities the earlier image is found; NaN is never found.

  >>> jaccard(np.array([0.1, 0.9, 0.8]), np.array([False, True, False]))
  1.0

  Args:
    sims: [C], of the candidates with the cue.
    chosen: [C] bool, at least one.
  """
  order = np.argsort(np.where(np.isnan(sims), np.inf, -sims), kind="stable")[: chosen.sum()]
  found = np.zeros(len(sims), bool)
  found[order] = True
  found &= ~np.isnan(sims)
  return float((found & chosen).sum() / (found | chosen).sum())


def prompt(cue: str) -> str:
  """The cue as a text, as the authors write it.

  >>> prompt("Owl"), prompt("full moon")
  ('An owl', 'A full moon')
  """
  lower = cue.lower()
  return f"{'An' if lower[:1] in (*'aeiou',) else 'A'} {lower}"


def read_cues(path: str, what: str) -> list[Cue]:
  """The cues of a .csv, .json or .jsonl file; lists in a .csv are JSON.

  Args:
    path: of the file; variables and ~ are expanded.
    what: the option that names it, for errors.

  Raises:
    FileNotFoundError: if the file is missing.
    ValueError: for a file of another form; names the record.
  """
  file = pathlib.Path(expand_variables(path, what=what)).expanduser()
  if not file.is_file():
    raise FileNotFoundError(f"{what}={path!r}: {file} does not exist")
  try:
    if file.suffix == ".csv":
      records: Any = [*csv.DictReader(io.StringIO(read_text(file)))]
    elif file.suffix == ".jsonl":
      records = [json.loads(line) for line in read_names(file) if line.strip()]
    else:
      records = json.loads(read_text(file))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{what}={path!r} is not {file.suffix[1:].upper()}: {error}") from error
  if not isinstance(records, list) or not records:
    raise ValueError(f"{what}={path!r} holds no list of records")
  return [_cue(record, f"{what}={path!r}, record {i}") for i, record in enumerate(records, 1)]


def _cue(record: Any, what: str) -> Cue:
  missing = [x for x in _FIELDS if not isinstance(record, Mapping) or not record.get(x)]
  if missing:
    raise ValueError(f"{what}: {missing} are missing; each record has {', '.join(_FIELDS)}")
  candidates, associations = (_names(record[name], what) for name in _FIELDS[1:])
  chosen = np.isin(candidates, associations)
  if chosen.sum() != len({*associations}) or len({*candidates}) != len(candidates):
    raise ValueError(
      f"{what}: its associations {associations} must be among its candidates {candidates}, of which"
      " none comes twice"
    )
  return Cue(str(record["cue"]), tuple(candidates), chosen)


def _names(value: Any, what: str) -> list[str]:
  """A list of names, which may be written as JSON."""
  try:
    names = json.loads(value) if isinstance(value, str) else value
  except ValueError:
    names = None
  if not isinstance(names, list) or not all(isinstance(x, str) for x in names):
    raise ValueError(f"{what}: {value!r} is no list of names")
  return names


def associations(
  context: Context, *, file: str, images: str = "", batch_size: int = 256
) -> Callable[[Any], dict[str, float]]:
  """The Jaccard index of WinoGAViL: the images of a cue that a model finds among others.

  A cue is embedded as "A cue" or "An cue". Cues of which an image cannot be read are left out,
  named in the log and counted as "rejected". NaN and equal similarities are as of `jaccard`.

  Args:
    context: model, mesh and data options.
    file: .csv, .json or .jsonl with cue, candidates and associations.
    images: folder of the images, whose names are those of the candidates, with an ending; "": the
      subfolder `images` if there is one, else that of the file.
    batch_size: images at a time, over all devices; rounded up to fit the mesh.

  Returns:
    run(params) -> {"val/<name>-associations-jaccard": mean, …}, jaccard_5-6 of cues with at most
    6 candidates, jaccard_10-12 of those with at least 10, which DataComp reports, and num_samples.

  Raises:
    FileNotFoundError: for a missing file or folder.
    ValueError: for a file of another form; when run, if no cue can be used.
  """
  at = f"config.evals.{context.name}"
  cues = read_cues(file, f"{at}.file")
  beside = pathlib.Path(expand_variables(file, what=f"{at}.file")).expanduser().parent
  names = list(dict.fromkeys(name for cue in cues for name in cue.candidates))
  examples = [Example(name, None, ()) for name in names]
  folder = image_folder(images, beside, at)
  source = Files([Set("images", examples, False, str(beside))], folder, context.data.apply_exif)
  data = read_data(context, source, batch_size=batch_size, captions=0)
  place = {name: i for i, name in enumerate(names)}
  embed_cues = texts_embedder(context, [prompt(cue.text) for cue in cues], batch_size=batch_size)

  def run(params: Any) -> dict[str, float]:
    ztxt = np.asarray(embed_cues(params))
    parts: list[Sequence[np.ndarray]] = []
    alone = context._replace(shared=None)
    for zimg, batch in embedded_images(alone, data, params):
      parts.append([to_host(x) for x in (zimg, batch["valid"], batch["rejects"])])
    z, valid, rejects = map(np.concatenate, zip(*parts))
    log_rejects(context.name, rejects.sum(0))
    scores, counts = [], []
    for cue, text in zip(cues, ztxt):
      own = np.array([place[name] for name in cue.candidates])
      if valid[own].all():
        scores.append(jaccard(z[own] @ text, cue.chosen))
        counts.append(len(own))
    if not scores:
      raise ValueError(f"{at}.file={file!r}: no cue has images that can all be read; see the log")
    found, candidates = np.array(scores), np.array(counts)
    kinds = {"": candidates > 0, "_5-6": candidates <= _FEW, "_10-12": candidates >= _MANY}
    metrics = {
      f"jaccard{kind}": float(found[some].mean()) for kind, some in kinds.items() if some.any()
    }
    metrics["num_samples"] = len(scores)
    metrics |= {"rejected": len(cues) - len(scores)} if len(scores) < len(cues) else {}
    return {f"val/{context.name}-associations-{name}": value for name, value in metrics.items()}

  return run


def dataset_options(folder: str | pathlib.Path, option: str) -> dict[str, Any]:
  """The options for a folder with one .csv, .json or .jsonl and a folder of images.

  Args:
    folder: path.
    option: that names it, for errors.

  Raises:
    FileNotFoundError: if the folder or the file is missing.
  """
  path = pathlib.Path(folder).expanduser()
  found = [x for x in sorted(path.glob("*")) if x.suffix in (".csv", ".json", ".jsonl")]
  if not found:
    raise FileNotFoundError(f"{option}={folder}: there is no .csv, .json or .jsonl file")
  images = [x for x in sorted(path.glob("*images*")) if x.is_dir()]
  return dict(file=str(found[0]), images=str(images[0]) if images else "")
