"""Times one GPU against open_clip, in images per second and MFU: python benchmarks/gpu.py

B/16, L/14 and So400m/14 with texts of 64 tokens, bfloat16, CLIP loss, AdamW, clipping. bigalign
uses cuDNN's attention; open_clip runs under torch.compile, in bfloat16 autocast with its fused
attention. Each turn is a separate process, which has the whole card; the two alternate, and the
best turn counts. MFU is the model's FLOPs (without those that remat recomputes) over the dense
bfloat16 peak of the data sheet. Exits with 1 if bigalign is below MFU or slower than open_clip, and
with 2 without a GPU.

--tiny runs the same code on a CPU with a tiny model, to test the script.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import step

MFU = 0.4
B = dict(width=768, depth=12, heads=12)
L = dict(width=1024, depth=24, heads=16)
SO = dict(width=1152, depth=27, heads=16, hidden=4304)
WORDS = dict(image=224, length=64, vocabulary=32_000)
MODELS = {
  "B/16": step.Sizes(batch=1024, patch=16, vision=B, text=B, embed=768, **WORDS),
  "L/14": step.Sizes(batch=1024, patch=14, vision=L, text=L, embed=1024, **WORDS),
  "So400m/14": step.Sizes(batch=1024, patch=14, vision=SO, text=SO, embed=1152, **WORDS),
}
TINY = {"tiny": step.SMALL._replace(batch=8)}
# Fits this batch into 80 GB. Both frameworks use the same setting.
REMAT = {"B/16": "dots", "L/14": "full", "So400m/14": "full", "tiny": "full"}


def turn(framework: str, name: str, *, tiny: bool, batch: int, steps: int) -> dict[str, Any]:
  """Runs one turn in this process; returns seconds per step and FLOPs per step."""
  sizes = (TINY if tiny else MODELS)[name]
  sizes = sizes._replace(batch=batch or sizes.batch)
  if framework == "bigalign":
    import jax

    from bigalign.run import flops

    run, work = step.ours(
      sizes, dtype="bfloat16", scan=True, remat=REMAT[name], attention=None if tiny else "cudnn"
    )
    device = jax.devices()[0]
    about = dict(flops=work, device=device.device_kind, peak=flops.peak(device))
  else:
    import torch

    device = "cpu" if tiny else "cuda"
    torch.set_float32_matmul_precision("high")
    run, _ = step.theirs(sizes, device=device, compiled=True, checkpointing=REMAT[name] != "none")
    about = dict(device=device if tiny else torch.cuda.get_device_name())
  for _ in range(3):
    run()
  seconds = []
  for _ in range(steps):
    begin = time.perf_counter()
    run()  # returns the loss to the host, so the step has ended
    seconds.append(time.perf_counter() - begin)
  return dict(about, seconds=min(seconds), batch=sizes.batch)


def in_a_process(framework: str, name: str, args: argparse.Namespace) -> dict[str, Any]:
  """Runs `turn` in a new process, which has the card for itself, and returns its result."""
  command = [
    sys.executable,
    __file__,
    f"--turn={framework}:{name}",
    f"--steps={args.steps}",
    f"--batch={args.batch}",
    *(["--tiny"] if args.tiny else []),
  ]
  platform = {"JAX_PLATFORMS": "cpu" if args.tiny else "cuda"}
  done = subprocess.run(command, env=os.environ | platform, stdout=subprocess.PIPE, text=True)
  if done.returncode:
    return dict(error=f"exit status {done.returncode}")
  result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
  return result


def main() -> int:
  """Prints a table, writes the JSON, and returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
  parser.add_argument("--batch", type=int, default=0, help="pairs (default 1,024)")
  parser.add_argument("--steps", type=int, default=10, help="timed steps per turn")
  parser.add_argument("--turns", type=int, default=2, help="turns; the best one counts")
  parser.add_argument("--tiny", action="store_true", help="run a tiny model on a CPU")
  parser.add_argument("--turn", help=argparse.SUPPRESS)
  parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("benchmarks/gpu.json"))
  args = parser.parse_args()
  if args.turn:
    framework, name = args.turn.split(":")
    print(json.dumps(turn(framework, name, tiny=args.tiny, batch=args.batch, steps=args.steps)))
    return 0
  if not args.tiny and not pathlib.Path("/proc/driver/nvidia").exists():
    print("This machine has no NVIDIA GPU. --tiny tests the script on a CPU.")
    return 2
  result: dict[str, Any] = dict(revision=step.revision(), command=sys.argv, models={})
  missed = False
  for name in TINY if args.tiny else args.models:
    turns = [
      {framework: in_a_process(framework, name, args) for framework in ("bigalign", "open_clip")}
      for _ in range(args.turns)
    ]
    rows = {}
    for framework in ("bigalign", "open_clip"):
      sound = [x[framework] for x in turns if "seconds" in x[framework]]
      if sound:
        rows[framework] = min(sound, key=lambda x: x["seconds"])
        rows[framework]["images_per_second"] = rows[framework]["batch"] / rows[framework]["seconds"]
      else:
        print(f"{name} {framework}: {turns[0][framework]['error']}")
    own, other = rows.get("bigalign"), rows.get("open_clip")
    if own and own["peak"]:
      for row in rows.values():  # both do the model's products
        row["mfu"] = own["flops"] / own["batch"] * row["images_per_second"] / own["peak"]
    for framework, row in rows.items():
      mfu = f"{row['mfu']:.1%} MFU" if "mfu" in row else "no peak known"
      print(f"{name:<10} {framework:<10} {row['images_per_second']:8.1f} images/s  {mfu}")
    slower = bool(own and other) and own["images_per_second"] < other["images_per_second"]
    missed |= not own or slower or own.get("mfu", 1.0) < MFU
    result["models"][name] = rows
  args.json.parent.mkdir(parents=True, exist_ok=True)
  args.json.write_text(json.dumps(result, indent=1) + "\n")
  return int(missed)


if __name__ == "__main__":
  sys.exit(main())
