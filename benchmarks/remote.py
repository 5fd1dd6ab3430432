"""Reads a remote store in blocks and in single samples: python benchmarks/remote.py

A store on this machine answers each request after 50 ms. One reader reads an epoch in the order of
blocks, and fetches the blocks of the next batch while it reads this one. The other reader fetches
each sample of the exact shuffle with its own request, equally far ahead, over four times the
connections. They take turns. Samples are random bytes that are not decoded, so that only the
transfer is measured. The exit status is 1 if the blocks are not RATIO times as fast, or the store
sends more than AMPLIFICATION times the bytes that are read.
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
from step import made_by

from bigalign.data.order.order import Order
from bigalign.data.sources.base import open_source
from bigalign.data.tar.remote_blocks import BLOCK, RemoteBlocks
from bigalign.run import runtime
from bigalign.shards import index

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))
from helpers.object_store_server import Store, store
from helpers.small_shards import write_tar

LATENCY = 0.05  # seconds before each answer
BATCH, BYTES = 128, 20_000  # of an image, as of 224 pixels
SHARDS, SAMPLES = 3, 8192  # of a shard; the order holds a third of an epoch
CONNECTIONS = dict(block=8, exact=32)
READ = dict(block=SHARDS * SAMPLES, exact=2048)  # samples of a round: an epoch; some seconds
RATIO, AMPLIFICATION = 3.0, 1.05


class RemoteSamples:
  """The bytes of remote samples, fetched in blocks of `block` samples."""

  fingerprint = ""

  def __init__(self, pattern: str, *, block: int, connections: int):
    self.block = block
    self._shards = open_source(pattern).shards
    self._remote = RemoteBlocks(self._shards, block=block, hold=4 * BATCH, connections=connections)

  def __len__(self) -> int:
    return len(self._shards)

  def __getitem__(self, i: int) -> bytes:
    return self._remote[i]

  def prefetch(self, ids: Iterable[int], *, hold: int = 0) -> None:
    self._remote.prefetch(ids, hold=hold)


def write_shards(folder: pathlib.Path) -> None:
  """Writes tars of jpg and txt."""
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


def measure(server: Store, kind: str, *, seed: int) -> dict[str, float]:
  """Returns samples per second of one reader, and bytes sent for each byte that it read."""
  source = RemoteSamples(
    f"{server.url}/{{0..{SHARDS - 1}}}.tar",
    block=BLOCK if kind == "block" else 1,
    connections=CONNECTIONS[kind],
  )
  order = Order(source, seed=seed, lane_rows=BATCH, kind=kind)
  batches = order(np.arange(READ[kind])).reshape(-1, BATCH)
  server.requests.clear()
  began, read = time.perf_counter(), 0
  for k in range(len(batches)):
    order.prefetch(batches[k : k + 2].ravel(), share=1.0)
    read += sum(len(source[i]) for i in batches[k].tolist())
  seconds = time.perf_counter() - began
  sent = sum(size for _, size in server.requests)
  return dict(
    samples_per_second=READ[kind] / seconds,
    amplification=sent / read,
    requests=len(server.requests),
  )


def main() -> int:
  """Prints the figures and writes the JSON; returns 1 if a target is missed."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=3, help="rounds; the median counts")
  parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("benchmarks/remote.json"))
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as name, store(pathlib.Path(name)) as server:
    write_shards(server.folder)
    os.environ["BIGALIGN_INDEX"] = f"{name}/index"
    index.main([f"{server.url}/{{0..{SHARDS - 1}}}.tar", f"--out={name}/index", "--workers=1"])
    server.latency = LATENCY
    rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in CONNECTIONS}
    for seed in range(args.rounds):
      for kind, figures in rounds.items():
        figures.append(measure(server, kind, seed=seed))
  speed = {
    kind: statistics.median(x["samples_per_second"] for x in figures)
    for kind, figures in rounds.items()
  }
  ratio = speed["block"] / speed["exact"]
  amplification = max(x["amplification"] for x in rounds["block"])
  for kind, count in CONNECTIONS.items():
    print(
      f"{kind:<6} {count:>3} connections {speed[kind]:>8.0f} samples/s"
      f" {speed[kind] * BYTES / 1e6:>6.0f} MB/s"
    )
  print(
    f"blocks are {ratio:.2f}x as fast (target {RATIO}), and {amplification:.3f} bytes are sent for"
    f" each byte that is read (target {AMPLIFICATION})"
  )
  args.json.write_text(
    json.dumps(
      dict(
        **made_by(runtime.versions()),
        latency=LATENCY,
        connections=CONNECTIONS,
        ratio=ratio,
        amplification=amplification,
        rounds=rounds,
        targets=dict(ratio=RATIO, amplification=AMPLIFICATION),
      ),
      indent=1,
    )
    + "\n"
  )
  return int(ratio < RATIO or amplification > AMPLIFICATION)


if __name__ == "__main__":
  sys.exit(main())
