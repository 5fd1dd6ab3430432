"""The loader against open_clip's get_wds_dataset: BIGALIGN_DATA=... python benchmarks/loader.py

Both read the same shards with two workers, in separate processes that take turns. The measure is
the CPU time of such a process and all its children from one idle moment to the next, which other
programs on the machine hardly affect. The images are photos of $BIGALIGN_DATA, resized and encoded
again. The exit status is 1 if a target is missed, or if open_clip is missing, which `make bench`
installs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import multiprocessing
import os
import pathlib
import statistics
import sys
import tarfile
import tempfile
import time
import types
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAYON_NUM_THREADS"] = "1"

import numpy as np
from PIL import Image
from rival import import_open_clip

from bigalign.data.image import decode, transforms
from bigalign.data.loader import training, workers
from bigalign.data.loader.options import resolve_data
from bigalign.data.order.permutation import philox
from bigalign.data.sources.base import Source, open_source

BATCH, SCALE, WORKERS = 128, (0.9, 1.0), 2


class Images(NamedTuple):
  """A set of images: the pixels of an edge, whether the shorter one, JPEG quality, and view."""

  edge: int
  shorter: bool
  quality: int
  size: int = 224


SETS = {
  "500px": Images(500, False, 96),
  "256px": Images(256, True, 95),
  "640px": Images(640, False, 95, size=384),
}
# Images per CPU-second, ours / theirs.
TARGETS = {
  ("bigalign", "500px"): 1.9,
  ("bigalign", "256px"): 2.2,
  ("pillow", "500px"): 1.35,
  ("pillow", "256px"): 1.35,
}
MAE = 0.1  # of 255 levels, from Pillow's bicubic
OVERHEAD = 0.15  # of the loader's CPU at 500px, beyond decoding and resizing

Epoch = Callable[[], int]  # reads the shards once, and returns the number of images


def make_shards(root: pathlib.Path, name: str, shards: list[str]) -> str:
  """Writes re-encoded copies of some shards, and returns their pattern."""
  edge, shorter, quality, _ = SETS[name]
  (root / name).mkdir()
  for s, shard in enumerate(shards):
    source = open_source(shard)
    with tarfile.open(root / name / f"{s:05d}.tar", "w") as tar:
      for i in range(len(source)):
        record = source[i]
        image = Image.open(io.BytesIO(record["image"])).convert("RGB")
        factor = edge / (min if shorter else max)(image.size)
        size = [round(side * factor) for side in image.size]
        image = image.resize(size, Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, "jpeg", quality=quality)
        for kind, data in (("jpg", file.getvalue()), ("txt", record["captions"][0].encode())):
          member = tarfile.TarInfo(f"{i:06d}.{kind}")
          member.size = len(data)
          tar.addfile(member, io.BytesIO(data))
  return f"{root}/{name}/{{00000..{len(shards) - 1:05d}}}.tar"


class OnlyPillow:
  """A source that turns off simplejpeg and kornia-rs in its process and in data workers."""

  def __init__(self, source: Source):
    self.__setstate__(dict(_source=source, fingerprint=source.fingerprint))

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    transforms._kornia, decode._JPEG = None, b"no file begins like this"

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> dict[str, Any]:
    return self._source[i]


def ours(pattern: str, size: int, *, pillow: bool = False) -> Epoch:
  """bigalign's loader; with `pillow`, only Pillow decodes and resizes."""
  source: Source = open_source(pattern)
  data = resolve_data(
    dict(
      source=pattern,
      image_size=size,
      tokenizer=dict(name="clip", length=77),
      augment=dict(scale=SCALE),
      workers=WORKERS,
    )
  )
  batches = training.train_batches(
    OnlyPillow(source) if pillow else source,
    data,
    batch_size=BATCH,
    rows=np.arange(BATCH),
    seed=0,
  )
  return lambda: sum(len(next(batches)["image"]) for _ in range(len(source) // BATCH))


def theirs(pattern: str, size: int) -> Epoch:
  """open_clip's loader: a shuffle buffer, its own transform and tokenizer, persistent workers."""
  import_open_clip()
  multiprocessing.set_start_method("fork", force=True)  # PyTorch's own choice on Linux
  import open_clip
  from open_clip_train.data import get_wds_dataset

  samples = len(open_source(pattern))
  transform = open_clip.image_transform(size, is_train=True, aug_cfg=dict(scale=SCALE))
  args = types.SimpleNamespace(
    train_data=pattern,
    train_num_samples=samples,
    train_data_upsampling_factors=None,
    seed=0,
    batch_size=BATCH,
    workers=WORKERS,
    world_size=1,
  )
  data = get_wds_dataset(
    args, transform, is_train=True, floor=True, tokenizer=open_clip.get_tokenizer("ViT-B-32")
  )
  return lambda: sum(len(images) for images, _ in data.dataloader)


class Decoding:
  """The work that every loader must do: decoding and resizing images that are in memory."""

  def __init__(self, images: list[bytes], size: int):
    self._images, self._size = images, size

  def __len__(self) -> int:
    return 1 << 62

  def __getitem__(self, k: int) -> dict[str, np.ndarray]:
    for r in range(BATCH):
      i = (k * BATCH + r) % len(self._images)
      image = decode.decode(self._images[i])
      transforms.train_image(image, philox(0, i), size=self._size, scale=SCALE)
    return dict(number=np.asarray([k]))


def decoding(pattern: str, size: int) -> Epoch:
  """Decoding in the same number of processes, so that they share the cores as the loader's do."""
  source = open_source(pattern)
  images = [source[i]["image"] for i in range(len(source))]
  batches = workers.iterate(Decoding(images, size), workers=WORKERS)
  return lambda: sum(BATCH for _ in range(len(images) // BATCH) if next(batches))


LOADERS: dict[str, Callable[[str, int], Epoch]] = dict(
  bigalign=ours,
  pillow=lambda pattern, size: ours(pattern, size, pillow=True),
  open_clip=theirs,
  decoding=decoding,
)


def family() -> list[int]:
  """The ids of this process and all its descendants."""
  pids = [os.getpid()]
  for pid in pids:  # grows meanwhile
    for children in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
      pids += [int(child) for child in children.read_text().split()]
  return pids


def cpu_seconds() -> float:
  """User and system time of the family, once all its threads are idle."""
  idle = 0
  while idle < 5:
    time.sleep(0.05)
    states = [
      stat.read_text().rpartition(") ")[2][0]
      for pid in family()
      for stat in pathlib.Path(f"/proc/{pid}/task").glob("*/stat")
    ]
    # This thread is the only one that may run.
    idle = idle + 1 if sum(state in "RD" for state in states) <= 1 else 0
  ticks = sum(
    int(x)
    for pid in family()
    for x in pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[11:15]
  )
  return ticks / os.sysconf("SC_CLK_TCK")


def serve(name: str, pattern: str, size: int, connection: Connection) -> None:
  """Measures an epoch whenever asked: sends CPU-seconds and wall seconds per image, or an error."""
  try:
    epoch = LOADERS[name](pattern, size)
    epoch()  # starts workers, fills caches
    connection.send("ready")
    while _asked(connection):
      cpu, wall = cpu_seconds(), time.perf_counter()
      images = epoch()
      wall = time.perf_counter() - wall
      connection.send(((cpu_seconds() - cpu) / images, wall / images))
  except Exception as error:
    connection.send(repr(error))


def _asked(connection: Connection) -> bool:
  try:
    return connection.recv() == "go"
  except EOFError:
    return False


def measure(pattern: str, size: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
  """Returns {loader: [(CPU-seconds, wall seconds) per image, of each round]}; they take turns.

  Raises:
    RuntimeError: for a loader that failed; names it.
  """
  context = multiprocessing.get_context("spawn")
  connections = {}
  times: dict[str, list[tuple[float, float]]] = {name: [] for name in LOADERS}

  def receive(name: str) -> Any:
    try:
      answer = connections[name].recv()
    except EOFError:
      answer = "its process died"
    if isinstance(answer, str) and answer != "ready":
      raise RuntimeError(f"the loader {name!r} failed: {answer}")
    return answer

  for name in LOADERS:
    connections[name], theirs = context.Pipe()
    context.Process(target=serve, args=(name, pattern, size, theirs)).start()
    theirs.close()
  try:
    for name in LOADERS:
      receive(name)
    for _ in range(rounds):
      for name, connection in connections.items():
        connection.send("go")
        times[name].append(receive(name))
  finally:  # the processes end with their connections
    for connection in connections.values():
      connection.close()
  return times


def error_of_fast_resize(pattern: str, size: int, *, images: int = 200) -> float:
  """Mean absolute difference in levels between the loader's images and Pillow's."""
  source = open_source(pattern)
  differences = []
  for i in range(0, len(source), -(-len(source) // images)):
    data = source[i]["image"]
    ours = transforms.train_image(decode.decode(data), philox(0, i), size=size, scale=SCALE)
    pixels = Image.open(io.BytesIO(data)).convert("RGB")
    top, left, height, width = transforms._random_box(
      philox(0, i),
      height=pixels.height,
      width=pixels.width,
      scale=SCALE,
      ratio=(3 / 4, 4 / 3),
    )
    box = (left, top, left + width, top + height)
    exact = pixels.crop(box).resize((size, size), Image.Resampling.BICUBIC)
    differences.append(np.abs(ours.astype(int) - np.asarray(exact)).mean())
  return float(np.mean(differences))


def compare(pattern: str, name: str, rounds: int) -> tuple[dict[str, Any], list[str]]:
  """Returns the figures of one set of images, and the targets that they miss."""
  size = SETS[name].size
  times = measure(pattern, size, rounds)
  median = {loader: statistics.median(cpu for cpu, _ in turns) for loader, turns in times.items()}
  ratios = {
    loader: [theirs[0] / ours[0] for ours, theirs in zip(times[loader], times["open_clip"])]
    for loader in ("bigalign", "pillow")
  }
  source = open_source(pattern)
  row: dict[str, Any] = dict(
    images=len(source),
    view_pixels=size,
    mean_bytes=np.mean([len(source[i]["image"]) for i in range(len(source))]),
    images_per_cpu_second={loader: round(1 / x, 1) for loader, x in median.items()},
    milliseconds_per_image={loader: round(1000 * x, 4) for loader, x in median.items()},
    ratio={loader: statistics.median(values) for loader, values in ratios.items()},
    ratios=ratios,
    overhead=statistics.median(
      1 - decoding[0] / ours[0] for ours, decoding in zip(times["bigalign"], times["decoding"])
    ),
    mean_absolute_error=error_of_fast_resize(pattern, size),
    rounds=times,
  )
  missed = [
    f"{loader} is {row['ratio'][loader]:.2f}x open_clip at {name}, the target is {target}"
    for (loader, size), target in TARGETS.items()
    if size == name and row["ratio"][loader] < target
  ]
  if row["mean_absolute_error"] > MAE:
    missed.append(f"{row['mean_absolute_error']:.3f} levels from Pillow at {name}, at most {MAE}")
  if name == "500px" and row["overhead"] > OVERHEAD:
    missed.append(f"overhead {row['overhead']:.3f} of the CPU at {name}, at most {OVERHEAD}")
  for loader, seconds in median.items():
    print(
      f"{name} {loader:<10} {1 / seconds:6.0f} images per CPU-second"
      + (
        f"  {row['ratio'][loader]:.2f}x ({min(ratios[loader]):.2f} to {max(ratios[loader]):.2f})"
        if loader in ratios
        else ""
      )
    )
  print(
    f"{name} overhead {row['overhead']:.3f}, {row['mean_absolute_error']:.3f} levels from Pillow"
  )
  return row, missed


def main() -> int:
  """Prints a table and writes the JSON; returns 1 if a target is missed."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=3, help="rounds; the median counts")
  parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
  parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("benchmarks/loader.json"))
  args = parser.parse_args()
  try:
    import_open_clip()
    import open_clip_train.data  # noqa: F401  # which needs webdataset and pandas
  except ImportError as error:
    parser.exit(1, f"{error}; `make bench` installs what the benchmarks need\n")
  # Imported late: the loaders' processes import this file, and must not start JAX.
  from step import made_by

  data = pathlib.Path(os.environ["BIGALIGN_DATA"])
  shards = [
    str(path)
    for name in ("coco2k", "flickr8k")
    for path in sorted((data / name / "train").glob("*.tar"))
  ]
  versions = {
    name: importlib.metadata.version(name)
    for name in (
      "grain",
      "simplejpeg",
      "kornia_rs",
      "pillow",
      "torch",
      "open_clip_torch",
      "webdataset",
    )
  }
  rows, missed = {}, []
  with tempfile.TemporaryDirectory() as folder:
    for name in args.sets:
      pattern = make_shards(pathlib.Path(folder), name, shards)
      rows[name], more = compare(pattern, name, args.rounds)
      missed += more
  print("\n".join(missed or ["all targets are met"]))
  result = dict(**made_by(versions), missed=missed, **rows)
  args.json.parent.mkdir(parents=True, exist_ok=True)
  args.json.write_text(json.dumps(result, indent=1) + "\n")
  return int(bool(missed))


if __name__ == "__main__":
  sys.exit(main())
