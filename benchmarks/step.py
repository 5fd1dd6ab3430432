"""Times a training step against the same model in open_clip: python benchmarks/step.py

Then the forward pass of both towers alone, as evaluation and embedding run it. Both alternate in
one process, and the best round counts: other programs on the machine slow some rounds down, but
never speed one up. Exits with 1 if bigalign is slower than GUARD times open_clip in one of the two.
Without torch and open_clip (`make bench` installs them), only bigalign runs.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# Without this, idle OpenMP threads of one framework spin and take the cores from the other one. The
# variables are read when torch is loaded.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["GOMP_SPINCOUNT"] = "0"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import importlib.metadata

import jax
import numpy as np
from rival import import_open_clip

from bigalign.checkpoint import revision
from bigalign.config import resolve_config
from bigalign.data.samples.rejects import REASONS
from bigalign.program import init_on_mesh, init_params, layout, make_embed, make_program
from bigalign.run import runtime
from bigalign.sharding import global_batch, host_rows, make_mesh
from bigalign.step import build, data_position, jitted


class Sizes(NamedTuple):
  """A dual encoder and its batch."""

  batch: int
  image: int
  patch: int
  length: int
  vocabulary: int
  vision: dict[str, int]  # width, depth, heads, and hidden if it is not 4 * width
  text: dict[str, int]
  embed: int


GUARD = 0.95  # ours / theirs, images per second
SMALL = Sizes(
  batch=64,
  image=64,
  patch=8,
  length=32,
  vocabulary=1000,
  embed=128,
  vision=dict(width=192, depth=4, heads=3),
  text=dict(width=128, depth=4, heads=2),
)
ADAMW = dict(lr=1e-3, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.2)

Step = Callable[..., float]  # (updates=1): runs them to their end and returns the last loss


def batch(sizes: Sizes, seed: int = 0) -> dict[str, np.ndarray]:
  """Returns noise images and random texts, each with the highest id as its end, for open_clip."""
  random, b = np.random.default_rng(seed), sizes.batch
  length = random.integers(4, sizes.length + 1, b)
  text = random.integers(1, sizes.vocabulary - 1, (b, sizes.length), dtype=np.int32)
  mask = np.arange(sizes.length)[None] < length[:, None]
  text[np.arange(b), length - 1] = sizes.vocabulary - 1
  return dict(
    image=random.integers(0, 256, (b, sizes.image, sizes.image, 3), dtype=np.uint8),
    text=np.where(mask, text, 0),
    text_mask=mask,
    image_id=np.zeros((b, 2), np.uint32),
    text_id=np.zeros((b, 2), np.uint32),
    label=np.zeros(b, np.int32),
    source=np.zeros(b, np.int32),
    rejects=np.zeros((b, len(REASONS)), np.int32),
    repaired=np.zeros(b, np.int32),
  )


def values(sizes: Sizes, **options: Any) -> dict[str, Any]:
  """Returns the config of these sizes; `options` go to both towers."""
  towers = dict(activation="gelu", scan=False, dtype="float32") | options

  def tower(widths: dict[str, int]) -> dict[str, Any]:
    tower: dict[str, Any] = {k: v for k, v in widths.items() if k != "hidden"} | towers
    if "hidden" in widths:
      tower["mlp_ratio"] = widths["hidden"] / widths["width"]
    return tower

  return dict(
    seed=0,
    total_steps=10**6,
    batch_size=sizes.batch,
    log_every=1,
    checkpoint_every=0,
    data=dict(image_size=sizes.image, tokenizer=dict(name="byte", length=sizes.length)),
    model=dict(
      image=dict(name="vit", patch=sizes.patch, pool="cls", **tower(sizes.vision)),
      text=dict(
        name="text",
        vocab_size=sizes.vocabulary,
        length=sizes.length,
        pool="eos",
        causal=True,
        mask_padding=False,
        **tower(sizes.text),
      ),
      embed_dim=sizes.embed,
    ),
    loss=dict(clip=dict(weight=1.0)),
    optimizer=dict(name="adamw", schedule="constant", **ADAMW),
  )


def ours(sizes: Sizes, **options: Any) -> tuple[Step, int]:
  """Returns the compiled step of bigalign and its useful FLOPs; `options` go to both towers."""
  program, mesh = make_program(resolve_config(values(sizes, **options))), make_mesh()
  replicated = [("", ())]  # rules: no parameter is sharded
  _, shardings = layout(program, mesh, replicated)
  with jax.set_mesh(mesh):
    state = init_on_mesh(program, shardings)
    rows = host_rows(mesh, sizes.batch)
    on_mesh = global_batch(mesh, batch(sizes), rows, sizes.batch)
    position = data_position(0, 1)
    step = build(jitted(program, shardings, mesh), program, state, on_mesh, position)

  def run(updates: int = 1) -> float:
    nonlocal state
    for _ in range(updates):
      state, metrics, _ = step.call(state, on_mesh, position)
    return float(metrics["loss"])

  return run, step.flops


def our_forward(sizes: Sizes) -> Step:
  """Returns the forward pass of both towers, to unit vectors."""
  program = make_program(resolve_config(values(sizes)))
  params, given = init_params(program, jax.random.key(0)), batch(sizes)
  embed = make_embed(program.model)
  image, text, mask = (jax.device_put(given[name]) for name in ("image", "text", "text_mask"))

  def run(updates: int = 1) -> float:
    for _ in range(updates):
      zimg = embed["embed_image"](params, image)
      ztxt = embed["embed_text"](params, text, mask)
      jax.block_until_ready((zimg, ztxt))
    return float(zimg[0, 0])

  return run


def their_forward(sizes: Sizes) -> Step:
  """Returns the forward pass of open_clip's towers, eager and without gradients."""
  model, image, text = their_model(sizes, "cpu")
  import torch

  model.eval()

  def run(updates: int = 1) -> float:
    with torch.inference_mode():
      for _ in range(updates):
        zimg, *_ = model(image, text)
    return float(zimg[0, 0])

  return run


def their_model(sizes: Sizes, device: str) -> tuple[Any, Any, Any]:
  """Returns open_clip's model with random weights, and a batch: images and texts."""
  import_open_clip()
  import torch
  from open_clip.model import CLIP

  torch.manual_seed(0)

  def mlp_ratio(widths: dict[str, int]) -> float:
    return widths.get("hidden", 4 * widths["width"]) / widths["width"]

  vision, words = sizes.vision, sizes.text
  model: Any = (
    CLIP(
      embed_dim=sizes.embed,
      vision_cfg=dict(
        image_size=sizes.image,
        patch_size=sizes.patch,
        width=vision["width"],
        layers=vision["depth"],
        head_width=vision["width"] // vision["heads"],
        mlp_ratio=mlp_ratio(vision),
      ),
      text_cfg=dict(
        context_length=sizes.length,
        vocab_size=sizes.vocabulary,
        width=words["width"],
        layers=words["depth"],
        heads=words["heads"],
        mlp_ratio=mlp_ratio(words),
      ),
    )
    .train()
    .to(device)
  )
  host = batch(sizes)
  # Normalised in advance, as its data loader does; bigalign normalises in the step.
  image = torch.from_numpy(host["image"]).to(device).permute(0, 3, 1, 2).contiguous()
  image, text = image.float() / 127.5 - 1, torch.from_numpy(host["text"]).long().to(device)
  return model, image, text


def theirs(
  sizes: Sizes, *, device: str = "cpu", compiled: bool = False, checkpointing: bool = False
) -> tuple[Step, int]:
  """Returns the step of the same model as open_clip trains it, and its FLOPs, or 0 if compiled.

  compiled: by torch.compile, in bfloat16 with its fused attention; otherwise eager, in float32.
  """
  model, image, text = their_model(sizes, device)
  import torch
  from open_clip import ClipLoss
  from torch.utils.flop_counter import FlopCounterMode

  model.set_grad_checkpointing(checkpointing)
  optimizer = torch.optim.AdamW(
    model.parameters(),
    lr=ADAMW["lr"],
    betas=(ADAMW["b1"], ADAMW["b2"]),
    eps=ADAMW["eps"],
    weight_decay=ADAMW["weight_decay"],
    fused=None if device == "cpu" else True,  # the fastest of its implementations
  )
  loss_function = ClipLoss()
  forward = torch.compile(model) if compiled else model

  def run(updates: int = 1) -> float:
    for _ in range(updates):
      optimizer.zero_grad()
      with torch.autocast(device, torch.bfloat16, enabled=compiled):
        loss = loss_function(*forward(image, text))
      loss.backward()
      torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
      optimizer.step()
    return float(loss.detach())

  if compiled:
    return run, 0
  with FlopCounterMode(display=False) as counter:
    run()
  return run, counter.get_total_flops()


def measure(runs: dict[str, Step], rounds: int, steps: int) -> dict[str, dict[str, float]]:
  """Returns {name: best wall and CPU seconds per step}; the runs alternate."""
  for run in runs.values():
    run()
  best = {name: {"wall_seconds": np.inf, "cpu_seconds": np.inf} for name in runs}
  for _ in range(rounds):
    for name, run in runs.items():
      wall, cpu = time.perf_counter(), time.process_time()
      for _ in range(steps):
        run()
      seconds = dict(
        wall_seconds=(time.perf_counter() - wall) / steps,
        cpu_seconds=(time.process_time() - cpu) / steps,
      )
      best[name] = {key: min(value, seconds[key]) for key, value in best[name].items()}
  return best


def machine() -> dict[str, object]:
  """Returns a description of the machine."""
  info = pathlib.Path("/proc/cpuinfo")
  models = (
    [line.split(": ")[1] for line in info.read_text().splitlines() if "model name" in line]
    if info.exists()
    else []
  )
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return dict(
    cpu=models[0] if models else platform.processor(),
    cores=cores,
    system=platform.platform(),
    python=platform.python_version(),
    **runtime.describe(),
  )


def made_by(versions: Mapping[str, str]) -> dict[str, object]:
  """What the JSON of each benchmark begins with: the code, the machine and the packages.

  Args:
    versions: {package: version}.
  """
  return dict(revision=revision(), machine=machine(), versions=versions)


def main() -> int:
  """Prints a table, writes the JSON, and returns 1 if the guard fails, otherwise 0."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=9, help="rounds; the best one counts")
  parser.add_argument("--steps", type=int, default=5, help="updates per round")
  parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("benchmarks/step.json"))
  args = parser.parse_args()

  runtime.setup(cache=None)  # malloc keeps freed memory, for both
  steps, versions = {"bigalign": ours(SMALL)}, runtime.versions()
  forwards = {"bigalign": our_forward(SMALL)}
  try:
    steps["open_clip"] = theirs(SMALL)
    forwards["open_clip"] = their_forward(SMALL)
    versions |= {name: importlib.metadata.version(name) for name in ("torch", "open_clip_torch")}
  except ImportError as error:
    print(f"bigalign alone: {error}; `make bench` installs what the comparison needs")

  best = measure({name: run for name, (run, _) in steps.items()}, args.rounds, args.steps)
  best_forward = measure(forwards, args.rounds, 3 * args.steps)
  rows = {
    name: dict(
      **best[name], images_per_second=SMALL.batch / best[name]["wall_seconds"], flops_per_step=work
    )
    for name, (_, work) in steps.items()
  }
  for name, row in rows.items():
    print(
      f"{name:<10} {row['wall_seconds']:.4f} s  {row['cpu_seconds']:.4f} CPU s"
      f"  {row['images_per_second']:.0f} images/s  {row['flops_per_step'] / 1e9:.2f} GFLOP"
    )
  for name, seconds in best_forward.items():
    wall, cpu = seconds["wall_seconds"], seconds["cpu_seconds"]
    print(f"{name:<10} {wall:.4f} s  {cpu:.4f} CPU s  forward")
  result: dict[str, Any] = dict(
    **made_by(versions),
    batch_size=SMALL.batch,
    rounds=args.rounds,
    steps=args.steps,
    **rows,
    forward=best_forward,
  )
  slower = False
  if "open_clip" in rows:
    for what, name, found in (("step", "ratio", best), ("forward", "ratio_forward", best_forward)):
      ratios = {key: found["open_clip"][key] / found["bigalign"][key] for key in found["bigalign"]}
      shown = ", ".join(f"{x:.2f}x by {key}" for key, x in ratios.items())
      print(f"bigalign / open_clip, {what}: {shown}")
      result[name] = ratios
      if ratios["wall_seconds"] < GUARD:
        slower = True
        print(f"the {what} is slower than the guard of {GUARD}x")
  args.json.parent.mkdir(parents=True, exist_ok=True)
  args.json.write_text(json.dumps(result, indent=1) + "\n")
  return int(slower)


if __name__ == "__main__":
  sys.exit(main())
