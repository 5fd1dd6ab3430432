"""Measures a config on this machine, without data or files of the config: random pixels and ids."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import pathlib
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from bigalign import sharding
from bigalign.config import Config
from bigalign.data.image import naflex
from bigalign.data.loader.options import resolve_data
from bigalign.data.sources.base import open_source
from bigalign.evals import make_evaluators
from bigalign.plan import chips, compile_step
from bigalign.private_apis import is_out_of_memory
from bigalign.program import init_on_mesh, layout, make_embed
from bigalign.shards.speed import loader_speeds
from bigalign.state import State
from bigalign.step import data_position, useful_flops

SAMPLES = 1024  # of the made-up dataset
BYTE_IDS = 259  # of the byte tokenizer
PHOTOS = 256
PIXELS = (375, 500)  # height and width of a photo of COCO


class Ready(NamedTuple):
  """A compiled step with its state and a batch on the devices."""

  step: compile_step.Step
  compiled: Any
  state: State
  batch: dict[str, jax.Array]
  compile_seconds: float
  useful_flops: int


def prepare(config: Config) -> Ready:
  """Compiles the step of a config for this machine and makes its state."""
  step = compile_step.trace_on(config.mesh.make(), config, samples=SAMPLES)
  with jax.set_mesh(step.mesh):
    begin = time.perf_counter()
    compiled = step.traced.lower().compile()
    seconds = time.perf_counter() - begin
    _, shardings = layout(step.program, step.mesh, config.rules)
    state = init_on_mesh(step.program, shardings)
    batch = _batch(step)
    work = useful_flops(step.program, step.traced.jaxpr, state, batch, data_position(0, SAMPLES))
  return Ready(step, compiled, state, batch, seconds, work)


@contextlib.contextmanager
def fitting(config: Config) -> Iterator[None]:
  """A context that compiles and runs a step; if memory does not suffice, the error says so."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if not is_out_of_memory(error):
      raise
    raise ValueError(
      f"the step of {config.batch_size:,} pairs does not fit into the memory of this machine; give"
      " fewer with --batch=N"
    ) from error


def _batch(step: compile_step.Step) -> dict[str, jax.Array]:
  """A global batch of random pixels, ids and vectors, in which every position of a text is used."""
  random, size = np.random.default_rng(0), step.program.batch_size
  rows = sharding.host_rows(step.mesh, size)
  ids = getattr(getattr(step.program.model.text_tower, "options", None), "vocab_size", None)

  def values(name: str, x: jax.ShapeDtypeStruct) -> np.ndarray:
    shape = (len(rows), *x.shape[1:])
    if x.dtype == jnp.uint8:
      return random.integers(0, 256, shape, np.uint8)
    if jnp.issubdtype(x.dtype, jnp.floating):
      return random.standard_normal(shape, np.float32).astype(x.dtype)
    if name in ("text", "text_second"):
      return random.integers(1, ids or 2, shape, np.int32)
    if name == "image_shapes":  # of squares as large as the patches allow
      return np.full(shape, math.isqrt(step.batch["image"].shape[1]), np.int32)
    return np.full(shape, name.endswith("mask"), x.dtype)  # else the one sample 0

  host = {name: values(name, x) for name, x in step.batch.items()}
  return sharding.global_batch(step.mesh, host, rows, size)


def training(ready: Ready, *, seconds: float) -> tuple[dict[str, Any], State]:
  """Figures of the training step, and the state after it; that of `ready` is used up.

  Returns:
    Median and least seconds of a step, images per second, FLOP/s of all devices, MFU, peak memory
    of a device, and the seconds of compilation; None for what this kind of device does not report.
  """
  state, position = ready.state, data_position(0, SAMPLES)

  def update() -> Any:
    nonlocal state
    state, metrics, _ = ready.compiled(state, ready.batch, position)
    return metrics

  with jax.set_mesh(ready.step.mesh):
    times = _seconds(update, seconds)
  median, batch = statistics.median(times), ready.step.program.batch_size
  peak = compile_step.sizes(ready.step)["peak_flops_per_second"]
  memory = [device.memory_stats() or {} for device in jax.local_devices()]
  held = [stats["peak_bytes_in_use"] for stats in memory if "peak_bytes_in_use" in stats]
  speed = ready.useful_flops / median
  figures = {
    "seconds_per_step": median,
    "least_seconds_per_step": min(times),
    "images_per_second": batch / median,
    "flops_per_second": speed,
    "mfu": speed / peak / ready.step.mesh.size if peak else None,
    "peak_bytes_per_chip": max(held, default=None),
    "compile_seconds": ready.compile_seconds,
  }
  return figures, state


def _seconds(call: Callable[[], Any], seconds: float) -> list[float]:
  """Seconds of a call, several times; on accelerators each is the mean of ten that are queued."""
  queued = 1 if jax.default_backend() == "cpu" else 10
  for _ in range(2):  # the first one may compile
    jax.block_until_ready(call())
  times: list[float] = []
  end = time.perf_counter() + seconds
  while len(times) < 3 or time.perf_counter() < end:
    begin = time.perf_counter()
    for _ in range(queued):
      result = call()
    jax.block_until_ready(result)
    times.append((time.perf_counter() - begin) / queued)
  return times


def planned(ready: Ready) -> dict[str, Any]:
  """What `bigalign plan` says of this step, from the program that was compiled here.

  Returns:
    "peak_bytes_per_chip", "flops_per_chip" and the like, as compile_step.measure; on a TPU also the
    topology, memory traffic, communication and [longest, shortest] "seconds_per_step".
  """
  step, device = ready.step, jax.devices()[0]
  plan = compile_step.sizes(step) | compile_step.held(step, ready.compiled.memory_analysis())
  kind = chips.of_device(device.device_kind)
  if kind:
    plan |= {"topology": _topology(kind), **compile_step.moved(ready.compiled.as_text())}
    plan["seconds_per_step"] = [*reversed(chips.step_seconds(plan))]
  return plan


def _topology(kind: str) -> str:
  """The slice of this machine's TPUs, as of `bigalign plan`: "v5e:2x4"."""
  places = np.asarray([getattr(device, "coords") for device in jax.devices()])  # noqa: B009
  sides = (places.max(0) - places.min(0) + 1).tolist()
  sides = sides[:2] if kind in ("v5e", "v6e") else sides
  slices = len({getattr(device, "slice_index", 0) for device in jax.devices()})
  return f"{kind}:{'x'.join(map(str, sides))}" + (f"*{slices}" if slices > 1 else "")


def embedding(ready: Ready, state: State, *, seconds: float) -> dict[str, float]:
  """Images and texts per second of the two towers, a batch at a time; {} for stored vectors."""
  if _stored(ready.step):
    return {}
  params, batch = {**state.trainable, **state.frozen}, ready.batch
  embed = make_embed(ready.step.program.model)
  calls = {
    "images_per_second": lambda: embed["embed_image"](params, naflex.of_fields(batch)),
    "texts_per_second": lambda: embed["embed_text"](params, batch["text"], batch["text_mask"]),
  }
  size = ready.step.program.batch_size
  with jax.set_mesh(ready.step.mesh):
    return {name: size / statistics.median(_seconds(x, seconds)) for name, x in calls.items()}


def _stored(step: compile_step.Step) -> bool:
  """Whether a batch holds vectors of a store, which no tower reads."""
  images, texts = step.batch.get("image"), step.batch["text"]
  return bool(images is None or images.dtype != jnp.uint8 or texts.dtype != jnp.int32)


@contextlib.contextmanager
def photos() -> Iterator[str]:
  """A context with the pattern of a tar of made-up photos; its index does not outlive it either."""
  before = os.environ.get("BIGALIGN_INDEX")
  with tempfile.TemporaryDirectory() as folder:
    os.environ["BIGALIGN_INDEX"] = f"{folder}/index"
    try:
      yield write_photos(pathlib.Path(folder))
    finally:
      del os.environ["BIGALIGN_INDEX"]
      os.environ |= {} if before is None else {"BIGALIGN_INDEX": before}


def write_photos(folder: pathlib.Path) -> str:
  """Writes a tar of made-up JPEG photos of COCO's size with captions; returns its pattern."""
  random = np.random.default_rng(0)
  with tarfile.open(folder / "0.tar", "w") as tar:
    for i in range(PHOTOS):
      coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), np.uint8))
      pixels = np.asarray(coarse.resize(PIXELS[::-1], Image.Resampling.BICUBIC), np.int16)
      pixels = pixels + random.integers(-12, 13, pixels.shape, np.int16)
      file = io.BytesIO()
      Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=90)
      for kind, data in (("jpg", file.getvalue()), ("txt", f"a picture of {i}".encode())):
        member = tarfile.TarInfo(f"{i:06d}.{kind}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
  return str(folder / "*.tar")


def loading(config: Config, source: str, *, seconds: float) -> dict[str, float]:
  """Samples per second of the loader: read, and also decoded, resized and tokenised."""
  opened, workers = open_source(source), min(config.data.workers, cores())
  speeds = loader_speeds(
    opened, image_size=config.data.image_size, workers=workers, seconds=seconds
  )
  return {
    "workers": workers,
    "read_per_second": speeds["read"],
    "images_per_second": speeds["decoded"],
  }


def evaluation(ready: Ready, state: State, source: str) -> dict[str, float]:
  """Retrieval on a source, once compiled; {} if the towers cannot read it.

  Returns:
    The pairs, the seconds, with the start of the data workers, and pairs per second.
  """
  step, config = ready.step, ready.step.stage.config
  ids = getattr(getattr(step.program.model.text_tower, "options", None), "vocab_size", 0)
  if _stored(step) or ids < BYTE_IDS:
    return {}
  tokenizer = dict(name="byte", length=config.data.text_length)
  data = resolve_data(dict(tokenizer=tokenizer, image_size=config.data.image_size))
  workers = min(config.data.workers, cores())
  data = dataclasses.replace(data, workers=workers, naflex=config.data.naflex)
  evals: Mapping[str, Any] = dict(val=dict(type="retrieval", source=source))
  embed: dict[str, Any] = make_embed(step.program.model)
  (evaluate,) = make_evaluators(evals, mesh=step.mesh, data=data, **embed).values()
  params, pairs = {**state.trainable, **state.frozen}, len(open_source(source))
  with jax.set_mesh(step.mesh):
    evaluate(params)
    begin = time.perf_counter()
    evaluate(params)
    seconds = time.perf_counter() - begin
  return {"pairs": pairs, "seconds": seconds, "pairs_per_second": pairs / seconds}


def cores() -> int:
  """CPU cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
