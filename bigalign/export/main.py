"""Writes a run as a folder that others load: bigalign export runs/clip --format=hf --out=clip-b16

bigalign export --check clip-b16 compares what the folder computes with the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from bigalign import tree
from bigalign.evaluate import Run, open_run
from bigalign.export import check, safetensors
from bigalign.export import model_card as card
from bigalign.export.fit import Subject
from bigalign.export.formats import FORMATS, Files, prepare
from bigalign.export.tokenizer_files import SAMPLES
from bigalign.run import runtime

ABOUT, CARD = "bigalign.json", "README.md"
_SIDE = 61  # pixels of the sample pictures' shorter side


def scalars(params: Mapping[str, Any], terms: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """ "t", the log of the logit scale, and "b", a bias, of the first term of the loss that learns it.

  A loss with a fixed temperature gives t = 0: logits are cosines.
  """
  for name in terms:
    learned = tree.subtree(params, f"loss/{name}/")
    if "temperature" in learned:
      return {"t": -np.log(np.asarray(learned["temperature"], np.float32))}
    if "t" in learned:
      return {k: np.asarray(learned[k], np.float32) for k in ("t", "b") if k in learned}
  return {"t": np.zeros((), np.float32)}


def subject(run: Run, ema: bool = False) -> Subject:
  """What of a run is exported: the model in float32, its parameters or their averages.

  Raises:
    ValueError: if the averages are asked for, and the run has none.
  """
  if ema and not run.ema:
    raise ValueError(f"--ema: {run.workdir} keeps no averages (config.ema)")
  params = run.ema if ema else run.params
  model = run.config.model
  towers = {"image": model.image, "text": model.text}
  in_float32 = {
    side: dataclasses.replace(tower, dtype="float32")
    for side, tower in towers.items()
    if hasattr(tower, "dtype")
  }
  arrays = {k: np.asarray(x).astype(np.float32) for k, x in tree.subtree(params, "model/").items()}
  return Subject(
    dataclasses.replace(model, **in_float32).build(),
    arrays | scalars(params, run.config.loss),
    run.config.data,
    run.config.data.make_tokenizer(),
  )


def pictures() -> list[np.ndarray]:
  """uint8 [H, W, 3]: smooth colours, upright, lying and square, whose centres nobody rounds."""
  rng = np.random.default_rng(0)
  found = []
  for height, width in ((1, 1), (2, 1), (1, 2), (1, 1)):
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    size = _SIDE * width, _SIDE * height
    found.append(np.asarray(small.resize(size, Image.Resampling.BICUBIC)))
  return found


def embeddings(it: Subject, texts: Sequence[str]) -> np.ndarray:
  """[M, E] float32, unit norm: of M texts."""
  ids, mask = it.tokenizer.encode_batch(texts)
  embed = jax.jit(functools.partial(it.model.apply, method="embed_text"))
  with jax.default_matmul_precision("highest"):
    return np.asarray(embed(_variables(it), ids, mask))


def _variables(it: Subject) -> dict[str, Any]:
  return {"params": tree.unflatten({k: x for k, x in it.arrays.items() if "/" in k})}


def logits(
  it: Subject, images: Sequence[np.ndarray], texts: Sequence[str] | np.ndarray
) -> np.ndarray:
  """[N, M] float32: of N pictures and M texts, by our own way from pixels and letters.

  Where the text tower is a place for vectors, texts are such, [M, D] or [M, 1 + T, D].
  """
  image = np.stack([it.data.evaluation_view(x) for x in images])
  read = (texts,) if isinstance(texts, np.ndarray) else it.tokenizer.encode_batch(texts)
  with jax.default_matmul_precision("highest"):
    feats = jax.jit(it.model.apply)(_variables(it), image, *read)
  cosines = np.asarray(feats["zimg"]) @ np.asarray(feats["ztxt"]).T
  return np.exp(it.arrays["t"]) * cosines + it.arrays.get("b", np.float32(0))


def export(
  run: Run, kind: str, out: str | pathlib.Path, *, ema: bool = False, license: str = "unknown"
) -> tuple[pathlib.Path, float | None]:
  """Writes the folder; (its path, largest difference, None where nothing can compute it).

  The folder appears whole, after it was compared, or not at all.

  Raises:
    FileExistsError: if there is something in `out`.
    ValueError: if the format cannot hold the model, with the keys of the config that say so and the
      formats that can; if the folder's logits or embeddings are not the run's.
  """
  out = pathlib.Path(out).absolute()
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise FileExistsError(f"--out={out} is there already; name another folder")
  it = subject(run, ema)
  made, what = prepare(kind, it), check.READERS[kind].what
  about = card.facts(run, kind, made.family, ema)
  out.parent.mkdir(parents=True, exist_ok=True)
  part = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
  try:
    _write(part, made, it, what)
    (part / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    found = check.difference(part) if check.possible(kind) else None
    if found is not None and not found <= check.TOLERANCE:
      raise ValueError(
        f"--format={kind}: the {what} of {made.family} differ from the run's by {found:.1e} of the"
        f" largest, more than {check.TOLERANCE}; nothing was written"
      )
    (part / CARD).write_text(card.text(about, made, it, license, found))
    part.chmod(0o755)
    part.replace(out)
  except BaseException:
    shutil.rmtree(part)
    raise
  return out, found


def _write(folder: pathlib.Path, made: Files, it: Subject, what: str) -> None:
  for name, content in made.files.items():
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(
      content
      if isinstance(content, str)
      else json.dumps(content, indent=None if name == "tokenizer.json" else 1, ensure_ascii=False)
    )
  for name, make in made.tensors.items():
    arrays: dict[str, Any] = make()
    if name.endswith(".npz"):
      np.savez(folder / name, **arrays)
    else:
      safetensors.save(folder / name, arrays.items(), format="pt")
  texts: Any = SAMPLES
  if it.vectors:
    texts = np.random.default_rng(0).standard_normal((4, *it.vectors)).astype(np.float32)
  samples: dict[str, Any] = {"texts": np.asarray(texts)}
  if what == "embeddings":
    samples[what] = embeddings(it, SAMPLES)
  else:
    images = pictures()
    samples |= {f"image_{i}": x for i, x in enumerate(images)}
    samples[what] = logits(it, images, texts)
  np.savez(folder / check.SAMPLES, **samples)


def main(argv: Sequence[str] | None = None) -> int:
  """The program; returns its exit status."""
  parser = argparse.ArgumentParser(
    prog="bigalign export",
    description="Writes a checkpoint of a run as a folder for PyTorch, or compares such a folder's"
    " logits or embeddings with those that the run gave for some pictures and texts.",
  )
  parser.add_argument("run", nargs="?", help="the --workdir of a training run")
  parser.add_argument("--format", choices=sorted(FORMATS), help="whose folder")
  parser.add_argument("--out", metavar="DIR", help="the folder; must be new or empty")
  parser.add_argument("--step", default="latest", help="number, latest or best (%(default)s)")
  parser.add_argument("--ema", action="store_true", help="the averages of the parameters")
  parser.add_argument(
    "--license", default="unknown", help="of the weights, for the model card (%(default)s)"
  )
  parser.add_argument("--check", metavar="DIR", help="compare the outputs of an exported folder")
  args = parser.parse_args(argv)
  if not args.check and not (args.run and args.format and args.out):
    parser.error("RUN, --format and --out are needed, or --check DIR")
  found: float | None
  try:
    if args.check:
      out, found = pathlib.Path(args.check), check.difference(pathlib.Path(args.check))
    else:
      runtime.setup()
      opened = open_run(args.run, args.step)
      out, found = export(opened, args.format, args.out, ema=args.ema, license=args.license)
  except (ValueError, OSError, ImportError) as error:
    parser.exit(1, f"bigalign export: {error}\n")
  if found is None:
    needed = " and ".join(check.missing(args.format))
    print(f"{out}: written; outputs not compared, for want of {needed}")
    return 0
  print(f"{out}: outputs differ from the run's by {found:.1e} of the largest at most")
  return int(not found <= check.TOLERANCE)


def run() -> None:
  """The program `bigalign export`."""
  raise SystemExit(main())


if __name__ == "__main__":
  run()
