"""Times texts cut to their batch with texts padded to 77 tokens: python benchmarks/texts.py

The text tower of CLIP B/16 (width 512, 12 layers, float32, random weights). First a batch of texts
of 16 tokens, then the class embeddings of a zero-shot evaluation: prompts of random lengths, sorted
and cut as the evaluators do it. Both ways alternate in one process, and the best turn counts. Exits
with 1 if texts of 16 tokens are not RATIO times as fast, or embeddings differ by more than 1e-6.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from step import made_by

from bigalign import sharding, tree
from bigalign.data.loader.options import resolve_data
from bigalign.evals.embed import Context, mean_embedder
from bigalign.model import make_model
from bigalign.program import make_embed
from bigalign.run import runtime
from bigalign.towers.padding import cut

RATIO = 5.0
LENGTH, VOCABULARY = 77, 49408
EOS = VOCABULARY - 1
BATCH, CLASSES, TEMPLATES = 32, 32, 8


def texts(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns random ids [N, 77] of texts with these numbers of tokens, padded with 0, and a mask."""
  random = np.random.default_rng(0)
  ids = random.integers(1, EOS, (len(lengths), LENGTH)).astype(np.int32)
  ids[np.arange(len(ids)), lengths - 1] = EOS
  mask = np.arange(LENGTH)[None] < lengths[:, None]
  return np.where(mask, ids, 0), mask


def alternate(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
  """Returns {way: CPU and wall seconds of its best turn, wall seconds of the first}."""
  first: dict[str, float] = {}
  cpu: dict[str, list[float]] = {name: [] for name in ways}
  wall: dict[str, list[float]] = {name: [] for name in ways}
  for turn in range(rounds + 1):
    for name, way in ways.items():
      cpu_begin, begin = time.process_time(), time.perf_counter()
      jax.block_until_ready(way())
      seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
      if turn:
        cpu[name].append(cpu_seconds)
        wall[name].append(seconds)
      else:
        first[name] = seconds
  return {
    name: dict(cpu_seconds=min(cpu[name]), seconds=min(wall[name]), first_seconds=first[name])
    for name in ways
  }


def main() -> int:
  """Prints a table, writes the JSON, and returns 1 if a target is missed, otherwise 0."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=5, help="turns of each way; the best counts")
  parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("benchmarks/texts.json"))
  args = parser.parse_args()
  runtime.setup()
  tower = dict(vocab_size=VOCABULARY, length=LENGTH, width=512, depth=12, heads=8, dtype="float32")
  clip = dict(name="text", causal=True, pool="eos", eos=EOS, mask_padding=False, scan=False)
  model = make_model(
    image=dict(name="vit", patch=8, width=16, depth=1, heads=2),
    text={**tower, **clip},
    embed_dim=512,
  )
  image = jnp.zeros((1, 8, 8, 3), jnp.uint8)
  ids = jnp.zeros((1, LENGTH), jnp.int32)
  params = tree.flatten(jax.jit(model.init)(jax.random.key(0), image, ids)["params"], "model/")
  embed = make_embed(model)
  data = resolve_data(dict(image_size=8, tokenizer=dict(name="byte", length=LENGTH)))
  context = Context("prompts", mesh=sharding.make_mesh(), data=data, **embed)
  figures: dict[str, Any] = {}

  # ---- a batch of texts of 16 tokens
  ids, mask = texts(np.full(BATCH, 16))
  length = cut(embed["text_lengths"](ids, mask), LENGTH)
  ways: dict[str, Callable[[], Any]] = {
    "padded": lambda: embed["embed_text"](params, ids, mask),
    "cut": lambda: embed["embed_text"](params, ids[:, :length], mask[:, :length]),
  }
  differences = {"16 tokens": float(jnp.abs(ways["padded"]() - ways["cut"]()).max())}
  figures["16 tokens"] = alternate(ways, args.rounds)

  # ---- prompts of 8 to 18 tokens, 12 on average
  lengths = 7 + np.random.default_rng(1).binomial(19, 0.26, CLASSES * TEMPLATES)
  prompts = dict(zip(("ids", "mask"), texts(lengths)))
  ways = {}
  for name, used in (("padded", None), ("cut", embed["text_lengths"](**prompts))):
    weigh = mean_embedder(
      context,
      lambda params, batch: context.embed_text(params, batch["ids"], batch["mask"]),
      prompts,
      group=TEMPLATES,
      batch_size=BATCH,
      lengths=used,
    )
    ways[name] = lambda weigh=weigh: weigh(params)
  figures["prompts"] = alternate(ways, max(args.rounds // 2, 1))
  differences["prompts"] = float(jnp.abs(ways["padded"]() - ways["cut"]()).max())

  counts = {"16 tokens": BATCH, "prompts": CLASSES * TEMPLATES}
  ratios = {}
  for case, ways_of in figures.items():
    ratios[case] = ways_of["padded"]["cpu_seconds"] / ways_of["cut"]["cpu_seconds"]
    for name, x in ways_of.items():
      rate = counts[case] / x["cpu_seconds"]
      print(
        f"{case:10} {name:7} {rate:8.1f} texts per CPU-second, first {x['first_seconds']:.1f} s"
      )
    print(f"{case:10} {ratios[case]:.2f}x, largest difference {differences[case]:.1e}")
  written = {
    **made_by(runtime.versions()),
    "figures": figures,
    "ratio": ratios,
    "difference": differences,
  }
  args.json.write_text(json.dumps(written, indent=1) + "\n")
  met = ratios["16 tokens"] >= RATIO and max(differences.values()) <= 1e-6
  print("targets met" if met else f"missed: {RATIO}x at 16 tokens, differences of 1e-6")
  return 0 if met else 1


if __name__ == "__main__":
  sys.exit(main())
