"""Searches images by text or by image, with a trained or downloaded model."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import logging
import math
import os
import pathlib
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import rich.box
import rich.table
import rich.text

from bigalign.api import embedding
from bigalign.api.loading import load
from bigalign.api.model import Model
from bigalign.config import recorded_config, without_stores
from bigalign.data.files.draws import draw
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import Source, open_source
from bigalign.data.stores.reader import Store
from bigalign.frozen.embed import source_fingerprint
from bigalign.inputs import open_data
from bigalign.run import parsers, tables
from bigalign.search.collection import Collection, is_store, store_folder
from bigalign.search.index import EXACT_ROWS, Exact, Index, faiss, open_approximate
from bigalign.search.searcher import Result, Searcher

logger = logging.getLogger(__name__)

_RECALL_QUERIES = 100


def search(
  model: Model,
  where: str,
  *,
  source: str = "",
  captions: Sequence[str] | None = None,
  source_options: dict[str, Any] | None = None,
  out: str | pathlib.Path | None = None,
  index: str = "auto",
  probes: int = 32,
  memory: float = 8.0,
  batch_size: int = 64,
) -> Searcher:
  """Opens a dataset for search: embeds its images if that was not done before.

  Args:
    model: of bigalign.load.
    where: shards or another source, as config.data.source; or a store of `bigalign embed`.
    source: of a store: the source that it was made from, to show keys, captions and images; "": the
      training data of the run, if they are the same.
    captions: the fields of captions to show; None: those of the source.
    source_options: as config.data.source_options.
    out: folder of the embeddings; None: one in the cache (docs/search.md).
    index: "exact", "approximate", or "auto": exact up to 10 million rows.
    probes: of the approximate index, the number of lists that a query is compared with.
    memory: GiB for vectors as float32; those of larger stores are read from disk at each query.
    batch_size: images at a time over all devices.

  Raises:
    FileNotFoundError: for missing shards or a store that is not complete.
    ValueError: for a store of another model, or a source that it was not made from.
    ImportError: if the index needs faiss and it is missing; before any image is embedded.
  """
  opened: Source | None
  options = dict(source_options or {})
  if model.view is not None and model.view.reading.frames:
    options["frames"] = True
  if is_store(where):
    given = Store(store_folder(where))
    _check_faiss(index, len(given))
    store = _embeddings(model, given, out)
    opened = open_source(source, captions=captions, **options) if source else None
    collection = Collection(store, opened) if opened else _of_training(model, store, given)
    check_model(model, collection)
  else:
    if source:
      raise ValueError(f"--source={source}: only for a store, and {where!r} is a source itself")
    opened = open_source(where, captions=captions, **options)
    _check_faiss(index, len(opened))
    folder = out or embedding.cache_folder(model, opened.fingerprint)
    store = embedding.embed_source(model, opened, pathlib.Path(folder), batch_size=batch_size)
    collection = Collection(store, opened)
  return Searcher(model, _index(model, collection, index, probes, memory), collection)


def _embeddings(model: Model, store: Store, out: str | pathlib.Path | None) -> Store:
  """A store of `bigalign embed` in the space that the model shares between images and texts.

  Raises:
    ValueError: if another model made it.
  """
  header = store.header
  side = header.get("side", "image")
  if not header.get("projected"):
    if header.get("tokens") or side != "image":
      what = "every token" if header.get("tokens") else "texts before their projector"
      raise ValueError(
        f"{store.folder} holds {what}; search a store of images, or one of --projected embeddings"
      )
    folder = out or embedding.cache_folder(model, store.fingerprint)
    return embedding.project(model, store, pathlib.Path(folder))
  if store.width != model.embed_dim:
    raise ValueError(
      f"{store.folder} holds vectors of {store.width} numbers, and {model.source} makes"
      f" {model.embed_dim}: another model made the store"
    )
  if "view" in header and header["weights"] != embedding.weights_digest(model.params, side):
    raise ValueError(f"{store.folder} was made by other parameters than those of {model.source}")
  return store


def check_model(model: Model, collection: Collection, *, least: float = 0.98) -> None:
  """Embeds a few samples again, to see whether the model made the store.

  Nothing is compared, which is logged, without a source, or if the model lacks the side of the
  store: a run on stored embeddings has no image tower.

  Args:
    model: of the queries.
    collection: the store and its source.
    least: mean cosine of new and stored embeddings; towers in bfloat16 have above 0.99.

  Raises:
    ValueError: if they differ.
  """
  store = collection.store
  rows = [int(row) for row in draw(len(store), 4)]
  of_texts = store.header.get("side") == "text"
  embeds = model.tokenizer if of_texts else model.view
  given: dict[int, Any] = {}
  for row in rows if collection.source is not None and embeds is not None else ():
    with contextlib.suppress(Rejected):
      if of_texts:
        if captions := collection.item(row).captions:
          given[row] = captions[0]
      elif model.view is not None:
        image = collection.encoded(row)
        model.view(image)  # Rejected if it cannot be decoded any more
        given[row] = image
  if not given:
    logger.warning(
      "It was not checked that %s made %s: there is nothing to compare", model.source, store.folder
    )
    return
  known = [*given]
  again = (model.embed_texts if of_texts else model.embed_images)([*given.values()], progress=False)
  stored = store.read(np.array(known)).astype(np.float32)
  cosine = float(np.mean(np.sum(again * stored, 1) / np.linalg.norm(stored, axis=1)))
  if not cosine >= least:
    raise ValueError(
      f"{store.folder} was made by another model than {model.source}, or with other preprocessing:"
      f" embedded again, {len(known)} of its samples have mean cosine {cosine:.2f} with what is"
      " stored. Search the shards themselves, or embed them with this model"
    )


def _of_training(model: Model, store: Store, original: Store) -> Collection:
  """The store with the run's own training data, if it was made from them; else without samples.

  Args:
    model: of a run, or another one.
    store: whose rows are shown.
    original: the store that was given, which knows the source.
  """
  try:
    config = recorded_config({"config": without_stores(model.config)})
    inputs = open_data(config.data)
    source: Any = inputs.source
    # Of `bigalign search`, and of `bigalign embed` now and in older versions.
    known = [source.fingerprint] + [
      source_fingerprint(source, inputs.options, places=places) for places in (False, True)
    ]
    if len(original.sources) != 1 or original.sources[0]["fingerprint"] not in known:
      raise ValueError(f"{original.folder} was made from another source than {source!r}")
    return Collection(store, source)
  except (ValueError, TypeError, KeyError, OSError) as error:
    logger.info("the data of %s are not those of the store: %s", model.source, error)
    logger.warning("Without --source SHARDS, results have neither captions nor images")
    return Collection(store, None)


def _is_approximate(kind: str, rows: int) -> bool:
  return kind == "approximate" or (kind == "auto" and rows > EXACT_ROWS)


def _check_faiss(kind: str, rows: int) -> None:
  """Raises ImportError if the index needs faiss and it is missing."""
  if _is_approximate(kind, rows):
    faiss()


def _index(model: Model, collection: Collection, kind: str, probes: int, memory: float) -> Index:
  """The index of a store; logs the recall of an approximate one."""
  store = collection.store
  if not _is_approximate(kind, len(store)):
    return Exact(store, memory=int(memory * (1 << 30)))
  made, facts = open_approximate(
    store,
    probes=probes,
    queries=functools.partial(_captions, model, collection),
    origin=_origin(model, collection),
  )
  logger.warning(
    "Approximate index: %d lists, %d searched; it finds %.1f %% of the %d best rows of %d queries",
    facts["lists"],
    facts["probes"],
    100 * facts["recall"],
    facts["k"],
    facts["queries"],
  )
  return made


def _captions(model: Model, collection: Collection) -> np.ndarray:
  """Embeddings of captions of some samples, to measure recall with; rows if there are none."""
  rows = [int(row) for row in draw(len(collection), _RECALL_QUERIES)]
  texts = [text for row in rows for text in collection.item(row).captions[:1]]
  if texts and model.tokenizer is not None:
    return model.embed_texts(texts, progress=False)
  return collection.store.read(np.array(rows)).astype(np.float32)


def _origin(model: Model, collection: Collection) -> str:
  """Names the queries of `_captions`: the captions, and the model that embeds them."""
  if collection.source is None or model.tokenizer is None:
    return "rows"
  weights = embedding.weights_digest(model.params, "text")
  return f"captions of {collection.source.fingerprint} by {weights}"


def printable(text: str) -> str:
  """A text from strangers without control characters, which could change a terminal."""
  return "".join(c if c.isprintable() else " " for c in text)


def table(results: Sequence[Result]) -> rich.table.Table:
  """The results of a query, as wide as the terminal."""
  rows = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  rows.add_column("rank", justify="right")
  rows.add_column("score", justify="right")
  rows.add_column("key", overflow="fold")
  rows.add_column("caption", overflow="fold", ratio=1)
  for result in results:
    item = result.item
    rows.add_row(
      str(result.rank),
      f"{result.score:.4f}",
      rich.text.Text(printable(item.key or f"sample {item.place}")),
      rich.text.Text(printable(item.captions[0] if item.captions else item.note)),
    )
  return rows


def answers(
  searcher: Searcher, texts: Iterable[str], images: Sequence[str], k: int
) -> Iterator[tuple[dict[str, str], list[Result]]]:
  """Yields ({"query": text} or {"image": path}, results) of each query."""
  for text in texts:
    yield {"query": text}, searcher.texts([text], k)[0]
  for path in images:
    yield {"image": path}, searcher.images([path], k)[0]


def left_out(counts: Mapping[str, int]) -> str:
  """Says how many samples have no embedding, and why.

  >>> left_out({"undecodable": 1200, "empty": 1})
  '1,201 samples are left out: 1,200 undecodable, 1 empty'
  """
  number = sum(counts.values())
  reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
  return f"{number:,} {'sample is' if number == 1 else 'samples are'} left out: {reasons}"


def lines(interactive: bool) -> Iterator[str]:
  """Yields the texts of the standard input, one a line, until its end."""
  while True:
    if interactive:
      print("query> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
      return
    if line.strip():
      yield line.strip()


def _server() -> Any:
  """The module of the web page; ImportError without the extra `search`."""
  try:
    return importlib.import_module("bigalign.search.server")
  except ImportError as error:
    raise ImportError(
      f"bigalign search --serve needs the extra `search` ({error.name} is missing): pip install"
      " 'bigalign[search]'"
    ) from error


def serve(searcher: Searcher, title: str, host: str, listening: socket.socket) -> None:
  """Serves the web page until Ctrl-C.

  Args:
    searcher: answers the queries.
    title: of what is searched.
    host: address that the server listens on.
    listening: the socket that does.
  """
  server = _server()
  names = {"localhost"}
  if not server.is_loopback(host):
    names |= {host, socket.gethostname(), socket.getfqdn()}
    logger.warning(
      "--host=%s: everybody who reaches this machine can search and see all images; there is no"
      " password",
      host,
    )
  searcher.warm_up()
  app = server.create_app(searcher, title=title, names=frozenset(x.lower() for x in names))
  server.serve(app, listening, lambda address: print(f"{address}  (Ctrl-C ends it)", flush=True))


def main(words: Sequence[str] | None = None) -> None:
  """Runs the program."""
  parser = parsers.search()
  given = parser.parse_args(words)
  for name in ("k", "probes", "batch_size"):
    if (number := getattr(given, name)) < 1:
      parser.error(f"--{name}={number}: at least 1")
  if not 0 <= given.memory < math.inf:
    parser.error(f"--memory={given.memory}: a number of GiB, at least 0")
  if not 0 <= given.port < 1 << 16:
    parser.error(f"--port={given.port}: from 0 to 65535")
  pairs = [word.partition("=")[::2] for word in given.source_options]
  if not all(name and value for name, value in pairs):
    parser.error("--source_options: write NAME=VALUE, such as image=photo")
  for path in given.image:
    if not os.path.exists(path):
      parser.error(f"--image={path}: no such file")
  with contextlib.ExitStack() as held:
    # What is missing is reported here, and not after hours of embedding.
    if given.index == "approximate":
      faiss()
    listening = None
    if given.serve:
      listening = held.enter_context(_server().listen(given.host, given.port))
    _answer(given, dict(pairs), listening)


def _answer(
  given: argparse.Namespace, source_options: dict[str, Any], listening: socket.socket | None
) -> None:
  """Answers the queries of the command line, then those of the page that `listening` serves."""
  model = load(given.model, given.step, given.ema)
  searcher = search(
    model,
    given.where,
    source=given.source,
    captions=given.captions.split(",") if given.captions else None,
    source_options=source_options,
    out=given.out,
    index=given.index,
    probes=given.probes,
    memory=given.memory,
    batch_size=given.batch_size,
  )
  store = searcher.collection.store
  print(f"{len(store):,} embeddings in {store.folder}", file=sys.stderr)
  if store.left_out:
    print(left_out(store.left_out), file=sys.stderr)
  texts: Iterable[str] = given.query
  if not (given.query or given.image or given.serve):
    texts = lines(sys.stdin.isatty())
  console = tables.console()
  for query, results in answers(searcher, texts, given.image, given.k):
    if given.json:
      print(json.dumps(query | dict(results=[x.as_json() for x in results])), flush=True)
    else:
      (asked,) = query.values()
      console.print(rich.text.Text(printable(asked), style="bold"), soft_wrap=True)
      console.print(table(results))
  if listening is not None:
    serve(searcher, given.where, given.host, listening)


def run() -> None:
  """The program `bigalign search`."""
  main()
