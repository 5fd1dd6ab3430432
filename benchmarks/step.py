"""A training step against the same model in PyTorch and open_clip: python benchmarks/step.py

Both take turns in one process, and the best of the rounds counts: a neighbour on the machine slows
some of them, never speeds one up. Exit status 1 if ours is slower than GUARD times theirs. Without
torch and open_clip (extra `bench`, and a torchvision that open_clip can import) ours runs alone.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable

# OpenMP threads that spin while they wait would take the cores from whoever is not their turn;
# read when torch is loaded.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["GOMP_SPINCOUNT"] = "0"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import functools
import importlib.metadata

import jax
import numpy as np

from bigalign import flops, runtime, sharding
from bigalign import state as states
from bigalign.checkpoint import revision
from bigalign.data.rejects import REASONS
from bigalign.step import seen, train_step

GUARD = 0.7  # ours / theirs, images per second
BATCH, IMAGE, PATCH, LENGTH, VOCABULARY = 64, 64, 8, 32, 1000
VISION = dict(width=192, depth=4, heads=3)
TEXT = dict(width=128, depth=4, heads=2)
EMBED = 128
ADAMW = dict(lr=1e-3, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.2)

Step = Callable[[], float]  # one update, waited for; the loss


def batch(seed: int = 0) -> dict[str, np.ndarray]:
  """Noise and random words; each text ends with the highest id, which open_clip pools."""
  random = np.random.default_rng(seed)
  length = random.integers(4, LENGTH + 1, BATCH)
  text = random.integers(1, VOCABULARY - 1, (BATCH, LENGTH), dtype=np.int32)
  mask = np.arange(LENGTH)[None] < length[:, None]
  text[np.arange(BATCH), length - 1] = VOCABULARY - 1
  return dict(
    image=random.integers(0, 256, (BATCH, IMAGE, IMAGE, 3), dtype=np.uint8),
    text=np.where(mask, text, 0), text_mask=mask,
    image_id=np.zeros((BATCH, 2), np.uint32), text_id=np.zeros((BATCH, 2), np.uint32),
    label=np.zeros(BATCH, np.int32), source=np.zeros(BATCH, np.int32),
    rejects=np.zeros((BATCH, len(REASONS)), np.int32), repaired=np.zeros(BATCH, np.int32),
  )


def ours() -> tuple[Step, int]:
  """The step of bigalign, compiled, and its FLOPs."""
  towers = dict(activation="gelu", scan=False, dtype="float32")
  program = states.make_program(
    seed=0, total_steps=10**6, batch_size=BATCH,
    data=dict(image_size=IMAGE, tokenizer=dict(name="byte", length=LENGTH)),
    model=dict(
      image=dict(name="vit", patch=PATCH, pool="cls", **VISION, **towers),
      text=dict(name="text", vocab_size=VOCABULARY, length=LENGTH, pool="eos", causal=True,
                mask_padding=False, **TEXT, **towers),
      embed_dim=EMBED,
    ),
    loss=dict(clip=dict(weight=1.0)),
    optimizer=dict(name="adamw", schedule="constant", **ADAMW),
  )
  mesh = sharding.make_mesh()
  rules = [("", ())]
  _, placed = states.layout(program, mesh, rules)
  with jax.set_mesh(mesh):
    state = states.born(program, placed)
    step = jax.jit(functools.partial(train_step, program=program), donate_argnums=0,
                   out_shardings=(placed, sharding.replicated(mesh)))
    rows = sharding.host_rows(mesh, BATCH)
    on_mesh = sharding.global_batch(mesh, batch(), rows, BATCH)
    place = seen(0, 1)
    traced = step.trace(state, on_mesh, place)
    compiled = traced.lower().compile()

  def run() -> float:
    nonlocal state
    state, metrics = compiled(state, on_mesh, place)
    return float(metrics["loss"])

  return run, flops.of_jaxpr(traced.jaxpr)


def import_open_clip() -> None:
  """Imports it, with the two operators that torchvision's GPU build lacks over a CPU torch."""
  import torch

  try:
    import open_clip
  except RuntimeError as error:
    if "torchvision::nms" not in str(error):
      raise
    global library  # its operators live as long as it does
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import open_clip  # noqa: F401


def theirs() -> tuple[Step, int]:
  """The same model and update in PyTorch, eager, as open_clip trains; and its FLOPs."""
  import_open_clip()
  import torch
  from open_clip import ClipLoss
  from open_clip.model import CLIP
  from torch.utils.flop_counter import FlopCounterMode

  torch.manual_seed(0)
  model = CLIP(
    embed_dim=EMBED,
    vision_cfg=dict(image_size=IMAGE, patch_size=PATCH, width=VISION["width"],
                    layers=VISION["depth"], head_width=VISION["width"] // VISION["heads"]),
    text_cfg=dict(context_length=LENGTH, vocab_size=VOCABULARY, width=TEXT["width"],
                  layers=TEXT["depth"], heads=TEXT["heads"]),
  ).train()
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=ADAMW["lr"], betas=(ADAMW["b1"], ADAMW["b2"]), eps=ADAMW["eps"],
    weight_decay=ADAMW["weight_decay"],
  )
  loss_function = ClipLoss()
  host = batch()
  # Normalised beforehand, as its data loader would; ours does it in the step.
  image = torch.from_numpy(host["image"]).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
  text = torch.from_numpy(host["text"]).long()

  def run() -> float:
    optimizer.zero_grad()
    loss = loss_function(*model(image, text))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())

  with FlopCounterMode(display=False) as counter:
    run()
  return run, counter.get_total_flops()


def measure(runs: dict[str, Step], rounds: int, steps: int) -> dict[str, dict[str, float]]:
  """{name: best seconds per step, on the wall and of all cores}, taking turns."""
  for run in runs.values():
    run()
  best = {name: {"wall_seconds": np.inf, "cpu_seconds": np.inf} for name in runs}
  for _ in range(rounds):
    for name, run in runs.items():
      wall, cpu = time.perf_counter(), time.process_time()
      for _ in range(steps):
        run()
      found = dict(wall_seconds=(time.perf_counter() - wall) / steps,
                   cpu_seconds=(time.process_time() - cpu) / steps)
      best[name] = {key: min(value, found[key]) for key, value in best[name].items()}
  return best


def machine() -> dict[str, object]:
  """What the figures were measured on."""
  info = pathlib.Path("/proc/cpuinfo")
  models = [line.split(": ")[1] for line in info.read_text().splitlines() if "model name" in line
            ] if info.exists() else []
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return dict(cpu=models[0] if models else platform.processor(), cores=cores,
              system=platform.platform(), python=platform.python_version(), **runtime.describe())


def main() -> int:
  """Prints a table, writes the JSON; the exit status is that of the guard."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=9, help="turns of each; the best counts")
  parser.add_argument("--steps", type=int, default=5, help="updates in a turn")
  parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("benchmarks/step.json"))
  args = parser.parse_args()

  made, versions = {"bigalign": ours()}, runtime.versions()
  try:
    made["open_clip"] = theirs()
    versions |= {name: importlib.metadata.version(name) for name in ("torch", "open_clip_torch")}
  except ImportError as error:
    print(f"bigalign alone: {error}. The rival comes with pip install '.[bench]'")

  best = measure({name: run for name, (run, _) in made.items()}, args.rounds, args.steps)
  rows = {
    name: dict(**best[name], images_per_second=BATCH / best[name]["wall_seconds"],
               flops_per_step=work)
    for name, (_, work) in made.items()
  }
  for name, row in rows.items():
    print(f"{name:<10} {row['wall_seconds']:.4f} s  {row['cpu_seconds']:.4f} CPU s"
          f"  {row['images_per_second']:.0f} images/s  {row['flops_per_step'] / 1e9:.2f} GFLOP")
  result = dict(revision=revision(), machine=machine(), versions=versions, batch_size=BATCH,
                rounds=args.rounds, steps=args.steps, **rows)
  slower = False
  if "open_clip" in rows:
    ratios = {key: best["open_clip"][key] / best["bigalign"][key] for key in best["bigalign"]}
    print("bigalign / open_clip:", ", ".join(f"{x:.2f}x by {key}" for key, x in ratios.items()))
    result["ratio"] = ratios
    slower = ratios["wall_seconds"] < GUARD
    if slower:
      print(f"slower than the guard, {GUARD}x")
  args.json.parent.mkdir(parents=True, exist_ok=True)
  args.json.write_text(json.dumps(result, indent=1) + "\n")
  return int(slower)


if __name__ == "__main__":
  sys.exit(main())
