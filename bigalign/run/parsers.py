"""Command lines of the programs that import JAX and take no config.

They are defined here, apart from their programs, so that `--help` and a mistake in the flags need
no JAX. run/flags.py has those of the programs that take a config.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable

# Those of bigalign/export/formats.py, whose import takes seconds.
EXPORT_FORMATS = ("hf", "npz", "open_clip", "sentence-transformers", "torch")
EVALUATE_CACHE = "~/.cache/bigalign/evaluate"


def evaluate() -> argparse.ArgumentParser:
  """The command line of `bigalign evaluate`."""
  parser = argparse.ArgumentParser(
    prog="bigalign evaluate",
    description="Runs the evaluators of a run's config on one of its checkpoints, those given by"
    " --retrieval and --zeroshot, or the tasks of a suite.",
  )
  parser.add_argument(
    "model",
    nargs="+",
    help="the --workdir of a training run, or an exported folder or another that bigalign.load"
    " reads; several with --suite",
  )
  _add_step(parser)
  parser.add_argument(
    "--suite",
    metavar="SUITE",
    help="the name of a suite, or a .toml file of tasks (docs/evaluation.md)",
  )
  parser.add_argument(
    "--ema", action="store_true", help="with --suite: the averaged parameters of runs"
  )
  _add_data(parser)
  for name, text in (
    ("image", "vectors of the images of --retrieval"),
    ("text", "vectors of its captions"),
    ("class", "vectors of the prompts of the classes of --zeroshot"),
  ):
    parser.add_argument(f"--{name}_store", metavar="STORE", default="", help=text)
  parser.add_argument(
    "--cache",
    metavar="DIR",
    default=EVALUATE_CACHE,
    help="folder of embeddings and results that --suite keeps (%(default)s)",
  )
  parser.add_argument("--json", metavar="FILE", help="also write the metrics to this file")
  parser.add_argument("--csv", metavar="FILE", help="with --suite: also write a table")
  parser.add_argument("--html", metavar="FILE", help="with --suite: also write a page")
  return parser


def report() -> argparse.ArgumentParser:
  """The command line of `bigalign report`."""
  parser = argparse.ArgumentParser(
    prog="bigalign report", description="Writes a self-contained HTML page of a run."
  )
  _add_run(parser)
  return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("run", help="the --workdir of a training run")
  _add_step(parser)


def _add_step(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--step", default="latest", help="number, latest or best (%(default)s)")


def _add_data(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--retrieval", metavar="SHARDS", help="webdataset shards, or another source")
  parser.add_argument(
    "--fields",
    metavar="A,B",
    help="caption fields for --retrieval, such as json.captions,txt;"
    " config.data.captions if not given",
  )
  parser.add_argument(
    "--zeroshot",
    metavar="DIR",
    help="folder of a CLIP_benchmark dataset: shards, classnames.txt"
    " and zeroshot_classification_templates.txt",
  )


def export() -> argparse.ArgumentParser:
  """The command line of `bigalign export`."""
  parser = argparse.ArgumentParser(
    prog="bigalign export",
    description="Writes a checkpoint of a run as a folder for another library, or compares the"
    " outputs of such a folder with those of the run for some images and texts.",
  )
  parser.add_argument("run", nargs="?", help="the --workdir of a training run")
  parser.add_argument("--format", choices=EXPORT_FORMATS, help="the format of the folder")
  parser.add_argument("--out", metavar="DIR", help="the folder; must be new or empty")
  parser.add_argument("--step", default="latest", help="number, latest or best (%(default)s)")
  parser.add_argument("--ema", action="store_true", help="export the averaged parameters")
  parser.add_argument(
    "--heads",
    action="store_true",
    help="export the layers of losses too, such as a decoder of captions",
  )
  parser.add_argument("--name", help="of the model, for the model card (name of the run's folder)")
  parser.add_argument("--license", help="of the weights, for the model card, such as apache-2.0")
  parser.add_argument(
    "--dataset",
    action="append",
    metavar="ID",
    help="training data on the Hugging Face hub, for the model card; can be repeated",
  )
  parser.add_argument("--check", metavar="DIR", help="compare the outputs of an exported folder")
  parser.add_argument(
    "--push",
    metavar="REPO",
    help="upload the folder to this repository of the Hugging Face hub, such as user/clip, if its"
    " outputs match those of the run; logs in with `hf auth login` or HF_TOKEN",
  )
  parser.add_argument(
    "--private", action="store_true", help="with --push: a new repository is private"
  )
  parser.add_argument("--json", metavar="FILE", help="also write the outcome to this file")
  return parser


def merge() -> argparse.ArgumentParser:
  """The command line of `bigalign merge`."""
  parser = argparse.ArgumentParser(
    prog="bigalign merge",
    description="Averages the weights of models: (1 - alpha) * A + alpha * B, or the mean of"
    " several (--soup). The result is the folder of a run, which evaluate, export and"
    " config.model.init read.",
  )
  parser.add_argument(
    "models", nargs="+", metavar="MODEL", help="a run, or a folder of Hugging Face, open_clip …"
  )
  parser.add_argument("--alpha", type=float, default=0.5, help="share of the second (%(default)s)")
  parser.add_argument("--out", default="", metavar="DIR", help="the folder; must be new or empty")
  parser.add_argument(
    "--alphas", metavar="0,0.1,...,1", help="evaluate these shares in one table; writes no model"
  )
  parser.add_argument("--soup", action="store_true", help="the mean of all models")
  parser.add_argument(
    "--greedy",
    action="store_true",
    help="with --soup: only of models that do not make a metric of the mean worse, the best first",
  )
  parser.add_argument(
    "--metric", default="", help="of --greedy; config.keep.best of the first model if not given"
  )
  parser.add_argument(
    "--mode", choices=("max", "min"), default="max", help="which value is better (%(default)s)"
  )
  parser.add_argument(
    "--step", default="latest", help="of runs: number, latest or best (%(default)s)"
  )
  parser.add_argument("--ema", action="store_true", help="of runs: merge the averaged parameters")
  _add_data(parser)
  parser.add_argument("--json", metavar="FILE", help="also write the outcome to this file")
  return parser


def score() -> argparse.ArgumentParser:
  """The command line of `bigalign score`."""
  parser = argparse.ArgumentParser(
    prog="bigalign score",
    description="Writes a column: one number for each sample of a source, how well its image and"
    " caption fit each other for a trained model. `bigalign view --columns` and"
    " config.data.columns read it. The same command resumes.",
  )
  _add_run(parser)
  parser.add_argument("source", metavar="SHARDS", help="a source, as config.data.source")
  parser.add_argument("--out", required=True, metavar="NAME", help="writes NAME.npy, NAME.json")
  parser.add_argument(
    "--what",
    choices=("cosine", "loss", "margin", "teacher_margin", "learnability"),
    default="cosine",
    help="cosine of image and caption; softmax loss of the pair in its batch; cosine minus the"
    " largest one with another sample of the batch; the same of --teacher; loss minus that of"
    " --teacher, as JEST (%(default)s)",
  )
  parser.add_argument(
    "--teacher",
    nargs="+",
    metavar="RUN|IMAGES TEXTS",
    default=[],
    help="another run, or its stores of images and captions, of `bigalign embed --projected`",
  )
  parser.add_argument(
    "--teacher_scale",
    type=float,
    default=100.0,
    metavar="S",
    help="scale of the logits of stores; a run has its own (%(default)s)",
  )
  parser.add_argument("--ema", action="store_true", help="use the averaged parameters")
  parser.add_argument(
    "--captions", metavar="A,B", default="", help="fields; default: config.data.captions"
  )
  parser.add_argument(
    "--source_options", nargs="*", default=[], metavar="NAME=VALUE", help="as in config.data"
  )
  parser.add_argument("--batch_size", type=int, default=256, help="samples at a time (%(default)s)")
  parser.add_argument("--json", metavar="FILE", help="also write the summary to this file")
  return parser


def search() -> argparse.ArgumentParser:
  """The command line of `bigalign search`."""
  parser = argparse.ArgumentParser(
    prog="bigalign search",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    description="""\
Searches images by text or by image, with a trained or downloaded model.

The first search of shards embeds all their images, which takes a while, and keeps the embeddings;
later searches start at once. Queries come from --query and --image, from the standard input, one
text a line, or from a web page (--serve). A STORE is a folder that `bigalign embed` made with the
same model.""",
  )
  parser.add_argument(
    "model", help="what bigalign.load reads: a run, or a folder of Hugging Face, open_clip …"
  )
  parser.add_argument(
    "where", metavar="SHARDS|STORE", help="a source as config.data.source, or an embedding store"
  )
  parser.add_argument("--query", action="append", default=[], metavar="TEXT", help="repeatable")
  parser.add_argument("--image", action="append", default=[], metavar="FILE", help="repeatable")
  parser.add_argument("--k", type=int, default=10, help="results of each query (%(default)s)")
  parser.add_argument("--json", action="store_true", help="print one JSON object for each query")
  parser.add_argument("--serve", action="store_true", help="serve a web page until Ctrl-C")
  parser.add_argument("--host", default="127.0.0.1", help="of the page (%(default)s)")
  parser.add_argument("--port", type=int, default=8000, help="of the page (%(default)s)")
  parser.add_argument("--step", help="of a run: a number, latest or best (latest)")
  parser.add_argument("--ema", action="store_true", help="of a run: use its averaged parameters")
  parser.add_argument("--source", default="", metavar="SHARDS", help="what a STORE was made from")
  parser.add_argument("--captions", metavar="A,B", help="fields of the captions to show")
  parser.add_argument(
    "--source_options", nargs="*", default=[], metavar="NAME=VALUE", help="as in config.data"
  )
  parser.add_argument("--out", metavar="DIR", help="folder of the embeddings (in the cache)")
  parser.add_argument(
    "--index",
    choices=("auto", "exact", "approximate"),
    default="auto",
    help="auto: exact up to 10 million rows; approximate needs the extra search",
  )
  parser.add_argument(
    "--probes", type=int, default=32, help="of the approximate index: lists searched (%(default)s)"
  )
  parser.add_argument(
    "--memory", type=float, default=8.0, metavar="GIB", help="for the vectors (%(default)s)"
  )
  parser.add_argument("--batch_size", type=int, default=64, help="images at a time (%(default)s)")
  return parser


def costs() -> argparse.ArgumentParser:
  """The command line of `bigalign costs`."""
  parser = argparse.ArgumentParser(
    prog="bigalign costs",
    description="What each loss costs per device: temporary memory, products and communicated bytes"
    " of the compiled loss and its gradients.",
  )
  parser.add_argument("--losses", metavar="A,B", help="default: all")
  parser.add_argument(
    "--ways", metavar="A,B", help="to form the logits; default: all of them, without auto"
  )
  parser.add_argument("--batch", type=int, default=32768, help="global batch size (%(default)s)")
  parser.add_argument("--width", type=int, default=512, help="of the embeddings (%(default)s)")
  parser.add_argument(
    "--samples",
    type=int,
    default=0,
    help="samples of the dataset, for losses with per-sample state",
  )
  parser.add_argument(
    "--dtype", default="float32", help="of communicated features (%(default)s, or bfloat16)"
  )
  parser.add_argument("--topology", help="a TPU slice such as v5e:16x16; default: this machine")
  parser.add_argument(
    "--fsdp", type=int, default=1, help="size of that mesh axis; data gets the other devices"
  )
  parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
  parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
  parser.add_argument(
    "--out",
    metavar="FILE.md",
    type=pathlib.Path,
    help="add the rows to this document of all losses",
  )
  return parser


PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
  "evaluate": evaluate,
  "report": report,
  "export": export,
  "merge": merge,
  "score": score,
  "search": search,
  "costs": costs,
}
