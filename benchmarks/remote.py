"""Blocks of a far store against single samples of it: python benchmarks/remote.py

A store on this machine answers each request after 50 ms. One reader goes through an epoch in the
order of blocks and fetches the next batch's runs while it takes this one; the other fetches each
sample of the exact shuffle by itself, as far ahead, with four times the connections. They take
turns. Samples are random bytes that nobody decodes, so that it is the wire that is measured.
Exit status 1 if the blocks are not RATIO times as fast, or more is sent than AMPLIFICATION times
what is read.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable

import numpy as np
from step import machine

from bigalign.checkpoint import revision
from bigalign.data.order.order import Order
from bigalign.data.sources.base import open_source
from bigalign.data.tar.remote_blocks import RUN, Runs
from bigalign.run import runtime
from bigalign.shards import index

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))
from helpers.object_store_server import Store, store
from helpers.small_shards import write_tar

LATENCY = 0.05  # seconds before each answer
BATCH, BYTES = 128, 20_000  # of an image, as of 224 pixels
SHARDS, SAMPLES = 3, 8192  # of a shard; the order holds a third of an epoch
CONNECTIONS = dict(block=8, exact=32)
READ = dict(block=SHARDS * SAMPLES, exact=2048)  # samples of a turn: an epoch; some seconds
RATIO, AMPLIFICATION = 3.0, 1.05


class Records:
  """The bytes of samples, fetched in runs of `block`."""

  fingerprint = ""

  def __init__(self, pattern: str, *, block: int, connections: int):
    self.block = block
    self._shards = open_source(pattern).shards
    self._runs = Runs(self._shards, block=block, hold=4 * BATCH, connections=connections)

  def __len__(self) -> int:
    return len(self._shards)

  def __getitem__(self, i: int) -> bytes:
    return self._runs[i]

  def prefetch(self, ids: Iterable[int], *, hold: int = 0) -> None:
    self._runs.prefetch(ids, hold=hold)


def write_shards(folder: pathlib.Path) -> None:
  """Tars of jpg and txt."""
  random = np.random.default_rng(0)
  for shard in range(SHARDS):
    write_tar(
      folder / f"{shard}.tar",
      [
        member
        for i in range(SAMPLES)
        for member in (
          (f"{i:05d}.jpg", random.bytes(BYTES)),
          (f"{i:05d}.txt", b"a picture of the world"),
        )
      ],
    )


def turn(server: Store, kind: str, *, seed: int) -> dict[str, float]:
  """Samples per second of one reader, and bytes sent for each that it read."""
  source = Records(
    f"{server.url}/{{0..{SHARDS - 1}}}.tar",
    block=RUN if kind == "block" else 1,
    connections=CONNECTIONS[kind],
  )
  places = Order(source, seed=seed, lane_rows=BATCH, kind=kind)
  batches = places(np.arange(READ[kind])).reshape(-1, BATCH)
  server.requests.clear()
  began, read = time.perf_counter(), 0
  for k in range(len(batches)):
    places.prefetch(batches[k : k + 2].ravel(), share=1.0)
    read += sum(len(source[i]) for i in batches[k].tolist())
  seconds = time.perf_counter() - began
  sent = sum(size for _, size in server.requests)
  return dict(
    samples_per_second=READ[kind] / seconds,
    amplification=sent / read,
    requests=len(server.requests),
  )


def main() -> int:
  """Prints the figures, writes the JSON; the exit status tells whether the bars are met."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=3, help="turns of each; the median counts")
  parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("benchmarks/remote.json"))
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as name, store(pathlib.Path(name)) as server:
    write_shards(server.folder)
    os.environ["BIGALIGN_INDEX"] = f"{name}/index"
    index.main([f"{server.url}/{{0..{SHARDS - 1}}}.tar", f"--out={name}/index", "--workers=1"])
    server.latency = LATENCY
    turns = {kind: [] for kind in CONNECTIONS}
    for seed in range(args.rounds):
      for kind, found in turns.items():
        found.append(turn(server, kind, seed=seed))
  speed = {
    kind: statistics.median(x["samples_per_second"] for x in found) for kind, found in turns.items()
  }
  ratio = speed["block"] / speed["exact"]
  amplification = max(x["amplification"] for x in turns["block"])
  for kind, count in CONNECTIONS.items():
    print(
      f"{kind:<6} {count:>3} connections {speed[kind]:>8.0f} samples/s"
      f" {speed[kind] * BYTES / 1e6:>6.0f} MB/s"
    )
  print(
    f"blocks are {ratio:.2f}x as fast (bar {RATIO}), and {amplification:.3f} bytes are sent for"
    f" one that is read (bar {AMPLIFICATION})"
  )
  args.json.write_text(
    json.dumps(
      dict(
        revision=revision(),
        machine=machine(),
        versions=runtime.versions(),
        latency=LATENCY,
        connections=CONNECTIONS,
        ratio=ratio,
        amplification=amplification,
        turns=turns,
        bars=dict(ratio=RATIO, amplification=AMPLIFICATION),
      ),
      indent=1,
    )
    + "\n"
  )
  return int(ratio < RATIO or amplification > AMPLIFICATION)


if __name__ == "__main__":
  sys.exit(main())
