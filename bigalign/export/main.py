"""Writes a run as a folder for another library: bigalign export runs/clip --format=hf --out=clip

bigalign export --check clip compares the outputs of the folder with the run's; --push user/clip
uploads a folder to the Hugging Face hub once they match.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import shlex
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from bigalign import checks, tree
from bigalign.evaluate import Run, open_run
from bigalign.export import check, model_card
from bigalign.export import push as hub
from bigalign.export.base import Contents, TrainedModel
from bigalign.export.formats import FORMATS, prepare
from bigalign.export.tokenizer_files import SAMPLES
from bigalign.losses import logit_head
from bigalign.run import parsers, runtime, tables
from bigalign.towers.text import TextOptions

HEADS = "heads.safetensors"
ABOUT, CARD = "bigalign.json", "README.md"
_SIDE = 61  # pixels of the shorter side of the sample images


def trained_model(run: Run, ema: bool = False, heads: bool = False) -> TrainedModel:
  """The model of a run in float32, with its parameters or their running averages.

  Args:
    run: the run.
    ema: whether with the averages.
    heads: whether with the layers of losses.

  Raises:
    ValueError: if the averages or heads are wanted, and the run has none.
  """
  if ema and not run.ema:
    raise ValueError(f"ema (--ema): {run.workdir} keeps no averages (config.ema)")
  params = run.ema if ema else run.params
  model = run.config.model
  towers = {"image": model.image, "text": model.text}
  in_float32 = {
    side: dataclasses.replace(tower, dtype="float32")
    for side, tower in towers.items()
    if hasattr(tower, "dtype")
  }
  arrays = {k: np.asarray(x).astype(np.float32) for k, x in tree.subtree(params, "model/").items()}
  of_heads = {
    k: np.asarray(x).astype(np.float32)
    for k, x in params.items()
    if heads and k.startswith("heads/")
  }
  if heads and not of_heads:
    raise ValueError(f"heads (--heads): config.loss={[*run.config.loss]} has none with layers")
  tokenizer = run.config.data.make_tokenizer()
  text = in_float32.get("text", model.text)
  if isinstance(text, TextOptions) and text.length > tokenizer.length:
    # Other libraries pad texts to the length of the tower, which the run never saw.
    in_float32["text"] = dataclasses.replace(text, length=tokenizer.length)
    path = "text_tower/positions"
    rows = arrays[path]
    kept = [rows[:, : tokenizer.length]]
    if text.pool == "class":  # the position of the class token is the last one
      kept.append(rows[:, -1:])
    arrays[path] = np.concatenate(kept, 1)
  return TrainedModel(
    dataclasses.replace(model, **in_float32).build(),
    arrays | logit_head.scalars(params, run.config.loss),
    run.config.data,
    tokenizer,
    of_heads,
    run.config.loss,
  )


def sample_images() -> list[np.ndarray]:
  """Images uint8 [H, W, 3] of smooth colours: portrait, landscape and square.

  All resizers agree on their centre crops: no margin is half a pixel.
  """
  rng = np.random.default_rng(0)
  images = []
  for height, width in ((1, 1), (2, 1), (1, 2), (1, 1)):
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    size = _SIDE * width, _SIDE * height
    images.append(np.asarray(small.resize(size, Image.Resampling.BICUBIC)))
  return images


def embeddings(trained: TrainedModel, texts: Sequence[str]) -> np.ndarray:
  """[M, E] float32, unit norm: the embeddings of M texts."""
  ids, mask = trained.tokenizer.encode_batch(texts)
  embed = jax.jit(functools.partial(trained.model.apply, method="embed_text"))
  with jax.default_matmul_precision("highest"):
    return np.asarray(embed(_variables(trained), ids, mask))


def _variables(trained: TrainedModel) -> dict[str, Any]:
  """The parameters as flax takes them."""
  return {"params": tree.unflatten({k: x for k, x in trained.arrays.items() if "/" in k})}


def logits(
  trained: TrainedModel, images: Sequence[np.ndarray], texts: Sequence[str] | np.ndarray
) -> np.ndarray:
  """The logits of images and texts, with the run's own preprocessing and tokenizer.

  Args:
    trained: the model.
    images: N images, uint8 [H, W, 3].
    texts: M texts, or vectors [M, D] or [M, 1 + T, D] if the text tower is "features".

  Returns:
    [N, M] float32.
  """
  image = trained.data.stacked([trained.data.evaluation_view(x) for x in images])
  inputs = (texts,) if isinstance(texts, np.ndarray) else trained.tokenizer.encode_batch(texts)
  with jax.default_matmul_precision("highest"):
    feats = jax.jit(trained.model.apply)(_variables(trained), image, *inputs)
  cosines = np.asarray(feats["zimg"]) @ np.asarray(feats["ztxt"]).T
  scale, bias = np.exp(trained.arrays["t"]), trained.arrays.get("b", np.float32(0))
  return np.asarray(scale * cosines + bias)


def export(
  run: Run,
  kind: str,
  out: str | pathlib.Path,
  *,
  ema: bool = False,
  heads: bool = False,
  name: str = "",
  license: str | None = None,
  datasets: Sequence[str] = (),
) -> tuple[pathlib.Path, float | None]:
  """Writes the folder, which appears only once it is complete and compared.

  Args:
    run: the run.
    kind: the name of the format.
    out: the folder, which must be new or empty.
    ema: whether to export the averaged parameters.
    heads: whether to export the layers of losses too. CoCa's decoder becomes a part of open_clip's
      model; others are in heads.safetensors, by their paths.
    name: of the model, for the model card; "": that of the run's folder.
    license: of the weights, for the model card; None: not stated.
    datasets: identifiers of the training data on the Hugging Face hub, for the model card.

  Returns:
    The path of the folder, and the largest relative difference of its outputs from the run's, None
    if the library to compute them is not installed.

  Raises:
    FileExistsError: if the folder is not empty.
    ValueError: if the format cannot hold the model, with the keys of the config and the formats
      that can; or if the outputs of the folder are not the run's.
  """
  return write(
    trained_model(run, ema, heads),
    kind,
    out,
    lambda family: model_card.facts(
      run, kind, family, ema, name=name, license=license, datasets=datasets
    ),
  )


def write(
  trained: TrainedModel,
  kind: str,
  out: str | pathlib.Path,
  facts: Callable[[str], dict[str, Any]],
  card: Callable[..., str] = model_card.text,
) -> tuple[pathlib.Path, float | None]:
  """Writes the folder of a model; returns and raises as `export`.

  Args:
    trained: the model.
    kind: the name of the format.
    out: the folder.
    facts: returns the content of bigalign.json for the family of the model in the folder.
    card: returns the model card, as model_card.text.
  """
  if trained.data.prefix_tokens:
    raise ValueError(
      "config.data.prefix_tokens puts a learnt token into each text, which the tokenizers of other"
      " libraries do not; use the run itself with bigalign.load"
    )
  out = pathlib.Path(out).expanduser().absolute()
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise FileExistsError(f"{out} (--out) exists and is not an empty folder; choose another")
  form = checks.choose(FORMATS, kind, "format (--format)")
  if trained.heads and not form.heads:
    able = ", ".join(x.name for x in FORMATS.values() if x.heads)
    raise ValueError(f"--format={kind} has no place for heads (--heads); these have: {able}")
  contents = prepare(kind, trained)
  beside = {k: x for k, x in trained.heads.items() if k.split("/")[1] not in contents.heads}
  if beside:
    contents = contents._replace(tensors={**contents.tensors, HEADS: lambda: beside})
  about = facts(contents.family)
  out.parent.mkdir(parents=True, exist_ok=True)
  part = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
  try:
    _write(part, contents, trained, form.output)
    (part / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    difference = check.difference(part) if check.possible(kind) else None
    if difference is not None and not difference <= check.TOLERANCE:
      raise ValueError(
        f"--format={kind}: the {form.output} of {contents.family} differ from the run's by"
        f" {difference:.1e} of the largest, more than {check.TOLERANCE}; nothing was written"
      )
    text = card(about, form, contents, trained, difference)
    (part / CARD).write_text(text, encoding="utf-8")
    part.chmod(0o755)
    part.replace(out)
  except BaseException:
    shutil.rmtree(part)
    raise
  return out, difference


def _write(folder: pathlib.Path, contents: Contents, trained: TrainedModel, output: str) -> None:
  """Writes the contents and the samples with which the folder is compared."""
  for name, content in contents.files.items():
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(
      content
      if isinstance(content, str)
      else json.dumps(content, indent=None if name == "tokenizer.json" else 1, ensure_ascii=False)
    )
  for name, tensors in contents.tensors.items():
    # save_file writes the bytes of a view that is not contiguous in the wrong order.
    arrays: dict[str, Any] = {k: np.asarray(x, order="C") for k, x in tensors().items()}
    if name.endswith(".npz"):
      np.savez(folder / name, **arrays)
    else:
      save_file(arrays, folder / name, metadata={"format": "pt"})  # transformers needs the format
  texts: Any = SAMPLES
  if trained.vector_shape:
    rng = np.random.default_rng(0)
    texts = rng.standard_normal((4, *trained.vector_shape)).astype(np.float32)
  samples: dict[str, Any] = {"texts": np.asarray(texts)}
  if output == "embeddings":
    samples[output] = embeddings(trained, SAMPLES)
  else:
    images = sample_images()
    samples |= {f"image_{i}": x for i, x in enumerate(images)}
    samples[output] = logits(trained, images, texts)
  np.savez(folder / check.SAMPLES, **samples)


def main(argv: Sequence[str] | None = None) -> int:
  """The program; returns its exit status."""
  parser = parsers.export()
  args = parser.parse_args(argv)
  if not args.check and not (args.run and args.format and args.out):
    parser.error("RUN, --format and --out are needed, or --check DIR")
  if args.private and not args.push:
    parser.error("--private needs --push REPO")
  difference: float | None
  try:
    if args.push:
      hub.check_account(args.push)
    if args.check:
      out = pathlib.Path(args.check)
      difference = check.difference(out)
    else:
      if args.push and check.missing(args.format):
        needed = " and ".join(check.missing(args.format))
        raise ImportError(
          f"--push={args.push}: only a folder that was compared with the run is uploaded; comparing"
          f" this format needs {needed}"
        )
      runtime.setup()
      opened = open_run(args.run, args.step)
      out, difference = export(
        opened,
        args.format,
        args.out,
        ema=args.ema,
        heads=args.heads,
        name=args.name or (args.push or "").rpartition("/")[2],
        license=args.license,
        datasets=args.dataset or (),
      )
  except (ValueError, OSError, ImportError) as error:
    parser.exit(1, f"bigalign export: {error}\n")
  outcome: dict[str, Any] = {
    "folder": str(out),
    "difference": difference,  # relative, the largest; null: not compared
    "matches": None if difference is None else difference <= check.TOLERANCE,
    "uploaded": None,  # its address
  }
  if args.json:
    tables.write_json(args.json, outcome)
  if difference is None:
    needed = " and ".join(check.missing(args.format))
    print(f"{out}: written. Not verified: comparing the outputs needs {needed}")
    return 0
  if not difference <= check.TOLERANCE:
    print(
      f"{out}: outputs differ from the training run (maximum relative difference {difference:.1e})"
    )
    return 1
  print(
    f"{out}: verified. Outputs match the training run (maximum relative difference"
    f" {difference:.1e})"
  )
  if args.push:
    try:
      outcome["uploaded"] = hub.push(out, args.push, private=args.private)
    except (ValueError, OSError) as error:
      words = ["--check", str(out), "--push", args.push, *["--private"] * args.private]
      again = f"bigalign export {shlex.join(words)}"
      parser.exit(1, f"bigalign export: {error}\nThe folder is complete. Try again: {again}\n")
    print(f"{outcome['uploaded']}: uploaded")
    if args.json:
      tables.write_json(args.json, outcome)
  return 0


def run() -> None:
  """The program `bigalign export`."""
  raise SystemExit(main())


if __name__ == "__main__":
  run()
