"""Times one GPU against open_clip, in images per second and MFU: python benchmarks/gpu.py

B/16, L/14 and So400m/14 with texts of 64 tokens, bfloat16, CLIP loss, AdamW, clipping. bigalign
uses cuDNN's attention; open_clip runs under torch.compile, in bfloat16 autocast with its fused
attention and fused AdamW. Both recompute as little as fits into memory. Each turn is a separate
process, which has the whole card; the frameworks alternate, and the best turn counts. The script
waits for the device every 10 steps, as a training loop does that logs every 10 steps. MFU is the
model's FLOPs (without what is computed twice) over the dense bfloat16 peak of the data sheet.

The JSON is written after each process, so that what was measured stays if the time ends. --variants
adds turns of bigalign with other compiler flags or options. Exits with 1 if bigalign is below MFU
or slower than open_clip, and with 2 without a GPU.

--tiny runs the same code on a CPU with a tiny model, to test the script.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

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
# Tried in this order until one fits; open_clip recomputes whole blocks for all but "none". Without
# recomputation, L/14 and So400m/14 need about 200 GB at this batch.
REMAT = {"B/16": ["none", "dots", "full"]}
OPTIONS = dict(dtype="bfloat16", scan=True, attention="auto")


class Variant(NamedTuple):
  """Flags of XLA and options of both towers that differ from OPTIONS."""

  flags: tuple[str, ...] = ()
  options: Mapping[str, Any] = types.MappingProxyType({})


COMMANDS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION"
VARIANTS = {
  "command_buffers": Variant(
    (f"--xla_gpu_enable_command_buffer={COMMANDS}", "--xla_gpu_graph_min_graph_size=1")
  ),
  "no_command_buffers": Variant(("--xla_gpu_enable_command_buffer=",)),
  "no_triton_gemm": Variant(("--xla_gpu_enable_triton_gemm=false",)),
  "double_buffering": Variant(("--xla_gpu_enable_while_loop_double_buffering=true",)),
  "unrolled": Variant(options=dict(scan=False)),
  "gelu_tanh": Variant(options=dict(activation="gelu_tanh")),
  "xla_attention": Variant(options=dict(attention="xla")),
}
WAIT_EVERY = 10  # steps
LEAST_SECONDS = 30  # a process is not started with less


class Turn(NamedTuple):
  """One process: "bigalign", "open_clip" or a key of VARIANTS, on a model, with some remat."""

  runner: str
  model: str
  remat: str


def measure(turn: Turn, *, tiny: bool, batch: int, steps: int) -> dict[str, Any]:
  """Runs one turn in this process.

  Returns:
    Seconds per step, the batch and the device; of bigalign also FLOPs per step and the peak of the
    device. {"out_of_memory": True} if the model does not fit.
  """
  sizes = (TINY if tiny else MODELS)[turn.model]
  sizes = sizes._replace(batch=batch or sizes.batch)
  begin = time.perf_counter()
  about: dict[str, Any]
  if turn.runner == "open_clip":
    import torch

    device = "cpu" if tiny else "cuda"
    torch.set_float32_matmul_precision("high")
    run, _ = step.theirs(sizes, device=device, compiled=True, checkpointing=turn.remat != "none")
    about = dict(device=device if tiny else torch.cuda.get_device_name())
    error: Any = torch.OutOfMemoryError
  else:
    import jax

    from bigalign.run import flops, runtime

    runtime.setup(gpu_memory_fraction=0.92)
    error = jax.errors.JaxRuntimeError
    options = OPTIONS | dict(VARIANTS.get(turn.runner, Variant()).options)
    try:
      run, work = step.ours(sizes, remat=turn.remat, **options)
    except error as failure:
      return _unless_out_of_memory(failure)
    chip = jax.devices()[0]
    about = dict(flops=work, device=chip.device_kind, peak=flops.peak(chip))
  try:
    run(2)
    about["start_seconds"] = time.perf_counter() - begin
    run(WAIT_EVERY)
    seconds, loss = [], math.nan
    for _ in range(-(-steps // WAIT_EVERY)):
      begin = time.perf_counter()
      loss = run(WAIT_EVERY)  # returns the loss to the host, so the last step has ended
      seconds.append((time.perf_counter() - begin) / WAIT_EVERY)
  except error as failure:
    return _unless_out_of_memory(failure)
  return dict(about, seconds=min(seconds), batch=sizes.batch, loss=loss)


def _unless_out_of_memory(failure: Exception) -> dict[str, Any]:
  """A result that says so, or raises the other error."""
  from bigalign.private_apis import is_out_of_memory

  if "OutOfMemory" in type(failure).__name__ or is_out_of_memory(failure):
    return dict(out_of_memory=True)
  raise failure


def in_a_process(turn: Turn, args: argparse.Namespace, limit: float) -> dict[str, Any]:
  """Runs `measure` in a new process, which has the card for itself, for `limit` seconds at most."""
  command = [
    sys.executable,
    __file__,
    f"--turn={':'.join(turn)}",
    f"--steps={args.steps}",
    f"--batch={args.batch}",
    *(["--tiny"] if args.tiny else []),
  ]
  flags = [] if args.tiny else VARIANTS.get(turn.runner, Variant()).flags
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu" if args.tiny else "cuda",
    "XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip(),
    "TORCHINDUCTOR_CACHE_DIR": str(pathlib.Path("~/.cache/bigalign/inductor").expanduser()),
  }
  with subprocess.Popen(
    command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
  ) as process:
    try:
      out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
      return dict(error=f"longer than {limit:.0f} s")
    finally:
      if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # with the compiler's own processes
  if process.returncode:
    return dict(error=f"exit status {process.returncode}")
  result: dict[str, Any] = json.loads(out.splitlines()[-1])
  return result


def best(turns: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
  """Returns {model: {runner: its fastest turn, with images per second and MFU}}."""
  rows: dict[str, dict[str, dict[str, Any]]] = {}
  for turn in turns:
    of_model = rows.setdefault(turn["model"], {})
    held = of_model.get(turn["runner"], turn)
    if "seconds" in turn and turn["seconds"] <= held["seconds"]:
      of_model[turn["runner"]] = turn | {"images_per_second": turn["batch"] / turn["seconds"]}
  for of_model in rows.values():
    own = of_model.get("bigalign")
    for row in of_model.values():  # all do the model's products
      if own and own["peak"]:
        row["mfu"] = own["flops"] / own["batch"] * row["images_per_second"] / own["peak"]
  return rows


def main() -> int:
  """Prints a table, writes the JSON, and returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
  parser.add_argument("--variants", nargs="+", default=[], choices=list(VARIANTS))
  parser.add_argument("--batch", type=int, default=0, help="pairs (default 1,024)")
  parser.add_argument("--steps", type=int, default=30, help="timed steps per turn")
  parser.add_argument("--turns", type=int, default=2, help="turns; the best one counts")
  parser.add_argument("--limit", type=float, default=200, help="seconds per process")
  parser.add_argument("--budget", type=float, default=1800, help="seconds in all")
  parser.add_argument("--tiny", action="store_true", help="run a tiny model on a CPU")
  parser.add_argument("--turn", help=argparse.SUPPRESS)
  parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("benchmarks/gpu.json"))
  args = parser.parse_args()
  if args.turn:
    turn = Turn(*args.turn.split(":"))
    print(json.dumps(measure(turn, tiny=args.tiny, batch=args.batch, steps=args.steps)))
    return 0
  if not args.tiny and not pathlib.Path("/proc/driver/nvidia").exists():
    print("This machine has no NVIDIA GPU. --tiny tests the script on a CPU.")
    return 2
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the process of a turn too
  end = time.monotonic() + args.budget
  models = list(TINY) if args.tiny else args.models
  turns: list[dict[str, Any]] = []
  remat = {model: list(REMAT.get(model, ["full"])) for model in models}
  args.json.parent.mkdir(parents=True, exist_ok=True)
  for _ in range(args.turns):
    for model in models:
      for runner in ("bigalign", "open_clip", *args.variants):
        for policy in remat[model]:
          left = end - time.monotonic()
          if left < LEAST_SECONDS:
            break
          turn = Turn(runner, model, policy)
          turns.append(turn._asdict() | in_a_process(turn, args, min(args.limit, left)))
          print(json.dumps(turns[-1]), flush=True)
          result = dict(revision=step.revision(), command=sys.argv, turns=turns, best=best(turns))
          args.json.write_text(json.dumps(result, indent=1) + "\n")
          if "out_of_memory" not in turns[-1]:
            break
  rows, missed = best(turns), False
  for model in models:
    for runner, row in rows.get(model, {}).items():
      mfu = f"{row['mfu']:.1%} MFU" if "mfu" in row else "no peak known"
      print(f"{model:<10} {runner:<20} {row['images_per_second']:8.1f} images/s  {mfu}")
    own, other = (rows.get(model, {}).get(runner) for runner in ("bigalign", "open_clip"))
    slower = own and other and own["images_per_second"] < other["images_per_second"]
    missed |= not own or bool(slower) or own.get("mfu", 1.0) < MFU
  return int(missed)


if __name__ == "__main__":
  sys.exit(main())
