"""Seconds of one training step, float32 on CPU, against PyTorch and open_clip in the same process.

  python benchmarks/step.py --json=step.json

Both train the same geometry on the same batch: image normalisation, ViT, causal text transformer,
CLIP loss, backward pass, AdamW. The steps of both alternate and the best round of each counts: a
mean on a shared machine measures the neighbours. Exit 1 if open_clip is there and faster than
the guard allows.

The rival is the extra `bench`. Where no torchvision fits the installed torch, put one into a folder
of its own (pip install --no-deps --target FOLDER torchvision) and name it: --torchvision=FOLDER.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

# Before torch loads: its threads would spin on the cores that JAX is measured on.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from bigalign import flops, runtime
from bigalign import state as states
from bigalign.checkpoint import revision

BATCH, IMAGE, PATCH, LENGTH, VOCABULARY = 64, 64, 8, 32, 1000
WIDTH, DEPTH, HEADS, EMBED = 192, 4, 3, 128
GUARD = 0.7  # open_clip's seconds over ours, at least

CONFIG: dict[str, Any] = dict(
  seed=0,
  total_steps=1000,
  batch_size=BATCH,
  data=dict(image_size=IMAGE, tokenizer=dict(name="byte", length=LENGTH)),
  model=dict(
    image=dict(
      name="vit", patch=PATCH, width=WIDTH, depth=DEPTH, heads=HEADS, pool="cls",
      activation="gelu", scan=False, dtype="float32",
    ),
    text=dict(
      name="text", vocab_size=VOCABULARY, length=LENGTH, width=WIDTH, depth=DEPTH, heads=HEADS,
      causal=True, pool="eos", activation="gelu", scan=False, dtype="float32",
    ),
    embed_dim=EMBED,
    pixels="clip",
  ),
  loss=dict(clip=dict()),
  optimizer=dict(name="adamw", lr=1e-4, schedule="constant", weight_decay=0.2, clip_norm=None),
)


def batch() -> dict[str, np.ndarray]:
  """Random pixels and texts of full length; open_clip reads out the largest id, which is last."""
  draws = np.random.default_rng(0)
  text = draws.integers(1, VOCABULARY - 1, (BATCH, LENGTH), np.int32)
  text[:, -1] = VOCABULARY - 1
  return dict(
    image=draws.integers(0, 256, (BATCH, IMAGE, IMAGE, 3), np.uint8),
    text=text,
    text_mask=np.ones((BATCH, LENGTH), bool),
  )


def ours() -> tuple[Callable[[], None], int]:
  """(one step, its FLOPs)."""
  program = states.make_program(**CONFIG, dataset_size=BATCH)
  state = jax.jit(functools.partial(states.init_state, program))(jax.random.key(0))
  filled = {name: np.zeros(shape, dtype) for name, (shape, dtype) in program.spec.items()}
  data = jax.device_put({**filled, **batch()})
  step = jax.jit(functools.partial(states.train_step, program=program), donate_argnums=0)
  traced = step.trace(state, data, states.words(0))
  compiled = traced.lower().compile()

  def run() -> None:
    nonlocal state
    state, metrics = compiled(state, data, states.words(0))
    jax.block_until_ready(metrics)

  return run, flops.of_jaxpr(traced.jaxpr)


def theirs(torchvision: str | None) -> tuple[Callable[[], None], int]:
  """(one step of open_clip's CLIP in PyTorch, its FLOPs).

  Raises:
    ImportError: if torch, torchvision or open_clip is missing.
  """
  import torch

  if torchvision:
    # The two operators that a torchvision built for another torch asks for and nobody calls.
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.path.append(torchvision)
  import open_clip
  from open_clip.model import CLIP
  from torch.utils.flop_counter import FlopCounterMode

  torch.set_num_threads(os.cpu_count() or 1)
  torch.manual_seed(0)
  head = WIDTH // HEADS
  model = CLIP(
    embed_dim=EMBED,
    vision_cfg=dict(
      image_size=IMAGE, patch_size=PATCH, layers=DEPTH, width=WIDTH, head_width=head
    ),
    text_cfg=dict(
      context_length=LENGTH, vocab_size=VOCABULARY, layers=DEPTH, width=WIDTH, heads=HEADS
    ),
  ).train()
  criterion = open_clip.ClipLoss()
  decayed = [p for p in model.parameters() if p.ndim >= 2]
  rest = [p for p in model.parameters() if p.ndim < 2]
  optimizer = torch.optim.AdamW(
    [dict(params=decayed, weight_decay=0.2), dict(params=rest, weight_decay=0.0)], lr=1e-4
  )
  made = batch()
  image = torch.from_numpy(made["image"]).permute(0, 3, 1, 2).contiguous()
  text = torch.from_numpy(made["text"]).long()
  mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None] * 255
  std = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None] * 255

  def run() -> None:
    optimizer.zero_grad(set_to_none=True)
    zimg, ztxt, scale = model((image.float() - mean) / std, text)[:3]
    criterion(zimg, ztxt, scale).backward()
    optimizer.step()
    with torch.no_grad():
      model.logit_scale.clamp_(0, float(np.log(100)))

  with FlopCounterMode(display=False) as counter:
    run()
  return run, counter.get_total_flops()


def measure(run: Callable[[], None], steps: int) -> tuple[float, float]:
  """(wall seconds, CPU seconds) per step."""
  wall, cpu = time.perf_counter(), time.process_time()
  for _ in range(steps):
    run()
  return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def main() -> int:
  """Prints a table, writes JSON; 1 if the guard does not hold."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--rounds", type=int, default=9, help="of each, alternating (%(default)s)")
  parser.add_argument("--steps", type=int, default=5, help="in a round (%(default)s)")
  parser.add_argument("--torchvision", help="folder of a torchvision that pip cannot match")
  parser.add_argument("--json", help="file to write")
  args = parser.parse_args()

  rivals = {"bigalign": ours()}
  try:
    rivals["open_clip"] = theirs(args.torchvision)
  except ImportError as error:
    print(f"open_clip is not measured: {error}. pip install 'bigalign[bench]'", file=sys.stderr)
  for run, _ in rivals.values():
    measure(run, 2)
  rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in rivals}
  for _ in range(args.rounds):
    for name, (run, _) in rivals.items():
      rounds[name].append(measure(run, args.steps))

  found: dict[str, Any] = {
    name: dict(
      seconds=min(wall for wall, _ in rows), cpu_seconds=min(cpu for _, cpu in rows),
      images_per_second=BATCH / min(wall for wall, _ in rows), flops=rivals[name][1],
      rounds=rows,
    )
    for name, rows in rounds.items()
  }
  for name, row in found.items():
    print(
      f"{name:<10} {row['seconds'] * 1e3:8.1f} ms  {row['cpu_seconds'] * 1e3:8.1f} CPU ms"
      f"  {row['images_per_second']:8.0f} images/s  {row['flops'] / 1e9:.2f} GFLOP"
    )
  found["revision"], found["versions"] = revision(), runtime.versions()
  found["machine"] = dict(processor=processor(), cores=os.cpu_count(), python=sys.version.split()[0])
  if "open_clip" in rivals:
    for kind in ("seconds", "cpu_seconds"):
      found[f"ratio_{kind}"] = found["open_clip"][kind] / found["bigalign"][kind]
      print(f"open_clip / bigalign, {kind}: {found[f'ratio_{kind}']:.2f}")
  if args.json:
    with open(args.json, "w", encoding="utf-8") as file:
      json.dump(found, file, indent=1)
  return int(found.get("ratio_seconds", GUARD) < GUARD)


def processor() -> str:
  """The processor's name as Linux has it."""
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
      return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
  except (OSError, StopIteration):
    return platform.processor()


if __name__ == "__main__":
  sys.exit(main())
