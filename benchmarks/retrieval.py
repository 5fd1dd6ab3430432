"""Times exact retrieval in both directions, with faiss: python benchmarks/retrieval.py

Unit vectors of 512 numbers, an image and a caption of each sample: the rank of the caption among
all captions, and of the image among all images, as the evaluator `retrieval` computes them on one
device. faiss has a flat index of each side and finds the 10 best. Every turn is a process of its
own, which compiles, or builds the index, before the clock starts; the two alternate. The memory is
the largest that a process of bigalign used, with Python and the vectors. Exits with 1 above LIMIT
times the CPU seconds of faiss, above MEMORY bytes, or if a recall differs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np

LIMIT = 1.0
MEMORY = 2e9
WIDTH = 512
BATCH = 1000  # samples; divides --rows
RECALL_AT = (1, 5, 10)


def pairs(rows: int) -> list[np.ndarray]:
  """Returns images and captions [rows, WIDTH], unit norm, whose partner is often the nearest."""
  rng = np.random.default_rng(0)
  sides = []
  shared = rng.standard_normal((rows, WIDTH), np.float32)
  for _ in range(2):
    z = rng.standard_normal((rows, WIDTH), np.float32)
    z *= 2.5
    z += shared
    z /= np.sqrt(np.einsum("ne,ne->n", z, z))[:, None]  # in place: memory is measured
    sides.append(z)
  return sides


def by_bigalign(rows: int) -> dict[str, Any]:
  """Returns recalls, seconds and CPU seconds of the ranks in both directions."""
  import jax
  import jax.numpy as jnp
  from einops import rearrange

  from bigalign import sharding
  from bigalign.evals.embed import Embedded
  from bigalign.evals.retrieval import both_directions, recalls

  sides = pairs(rows)
  ztxt = jnp.asarray(rearrange(sides.pop(), "(n b) e -> n b 1 e", b=BATCH))
  zimg = jnp.asarray(rearrange(sides.pop(), "(n b) e -> n b e", b=BATCH))
  shape = zimg.shape[:2]
  embedded = Embedded(
    zimg=zimg,
    ztxt=ztxt,
    label=jnp.zeros(shape, jnp.int32),
    ordinal=jnp.arange(rows, dtype=jnp.int32).reshape(shape),
    valid=jnp.ones(shape, bool),
    texts_valid=jnp.ones((*shape, 1), bool),
    rejects=jnp.zeros(1, jnp.int32),
  )
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  compiled = jax.jit(both_directions, static_argnames="mesh").lower(embedded, mesh=mesh).compile()
  begin, cpu = time.perf_counter(), time.process_time()
  texts, images = map(np.asarray, jax.block_until_ready(compiled(embedded)))
  seconds = dict(seconds=time.perf_counter() - begin, cpu_seconds=time.process_time() - cpu)
  found = recalls("image_to_text", texts.ravel()) | recalls("text_to_image", images.ravel())
  return seconds | dict(recalls=[value for name, value in found.items() if "_R@" in name])


def by_faiss(rows: int) -> dict[str, Any]:
  """Returns recalls, seconds and CPU seconds of the 10 nearest in both directions."""
  import faiss

  sides = pairs(rows)
  indices = [faiss.IndexFlatIP(WIDTH) for _ in sides]
  for index, z in zip(indices, sides):
    index.add(z)
  begin, cpu = time.perf_counter(), time.process_time()
  found = [indices[1 - k].search(sides[k], max(RECALL_AT))[1] for k in range(2)]
  seconds = dict(seconds=time.perf_counter() - begin, cpu_seconds=time.process_time() - cpu)
  own = np.arange(rows)[:, None]
  return seconds | dict(
    recalls=[float((x[:, :k] == own).any(1).mean()) for x in found for k in RECALL_AT]
  )


WAYS = {"bigalign": by_bigalign, "faiss, flat": by_faiss}


def turn(way: str, rows: int) -> dict[str, Any]:
  """Returns what a process of its own measures."""
  command = [sys.executable, __file__, "--rows", str(rows), "--way", way]
  printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
  measured: dict[str, Any] = json.loads(printed.splitlines()[-1])
  return measured


def main() -> int:
  """Prints a table, writes the JSON, and returns 1 if a target is missed, otherwise 0."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, default=20_000, help="samples (%(default)s)")
  parser.add_argument("--rounds", type=int, default=3, help="turns of each way (%(default)s)")
  parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
  parser.add_argument(
    "--json", type=pathlib.Path, default=pathlib.Path("benchmarks/retrieval.json")
  )
  args = parser.parse_args()
  if args.rows % BATCH:
    parser.error(f"--rows {args.rows}: a multiple of {BATCH}")
  if args.way:
    measured = WAYS[args.way](args.rows)
    measured["peak"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(measured))
    return 0
  from step import made_by

  from bigalign.run import runtime

  versions = runtime.versions()
  ways = [way for way in WAYS if way == "bigalign" or importlib.util.find_spec("faiss")]
  if len(ways) > 1:
    versions["faiss-cpu"] = importlib.metadata.version("faiss-cpu")
  load = os.getloadavg()[0]
  turns: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
  for _ in range(args.rounds):
    for way in ways:
      turns[way].append(turn(way, args.rows))
  best: dict[str, dict[str, Any]] = {}
  for way, each in turns.items():
    best[way] = {
      name: min(one[name] for one in each) for name in ("seconds", "cpu_seconds")
    } | dict(peak=max(one["peak"] for one in each), recalls=each[0]["recalls"])
    figures = "{seconds:7.1f} s, {cpu_seconds:7.1f} CPU s".format(**best[way])
    print(f"{way:<12} {figures}, at most {best[way]['peak'] / 1e9:.2f} GB")
  own, rival = best["bigalign"], best.get("faiss, flat")
  missed = []
  if own["peak"] > MEMORY:
    missed.append(f"bigalign took {own['peak'] / 1e9:.2f} GB, above {MEMORY / 1e9:g}")
  ratio = own["cpu_seconds"] / rival["cpu_seconds"] if rival else None
  if ratio is not None and ratio > LIMIT:
    missed.append(f"{ratio:.2f}x of the CPU seconds of faiss, above {LIMIT:g}x")
  # Products are summed in another order, so that nearly equal ones can change places.
  if rival and not np.allclose(own["recalls"], rival["recalls"], rtol=0, atol=3 / args.rows):
    missed.append(f"recalls differ: {own['recalls']} and {rival['recalls']}")
  result = dict(
    **made_by(versions),
    rows=args.rows,
    width=WIDTH,
    load=load,
    best=best,
    turns=turns,
    ratio=ratio,
  )
  args.json.write_text(json.dumps(result, indent=1) + "\n")
  if ratio is not None:
    wall = own["seconds"] / rival["seconds"]
    print(f"{ratio:.2f}x of the CPU seconds of faiss, {wall:.2f}x of its seconds")
  print("\n".join(missed))
  return int(bool(missed))


if __name__ == "__main__":
  sys.exit(main())
