"""Indexed shards: building, opening and reading them: BIGALIGN_DATA=… python benchmarks/index.py

Random reads of indexed tars against webdataset in order and ArrayRecord at random, per CPU-second,
taking turns; without webdataset (extra `bench`) that part is left out and said so. The images are
real ones, re-encoded to about 110 KB. All times are CPU time, as neighbours on the machine lengthen
any other. Exit status 1 if a figure misses its bar.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import os
import pathlib
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable

import msgpack
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from step import machine

from bigalign.checkpoint import revision
from bigalign.data.sources.base import open_source
from bigalign.data.tar import index
from bigalign.run import runtime

BYTES = 110_000  # of an image
DISTINCT, SAMPLES, SHARDS = 128, 1024, 2  # images; samples per shard
LARGE_SHARDS, LARGE_SAMPLES = 20_000, 10_000  # 2e8 samples
# name → (bar, whether more is better)
BARS = dict(
  build_samples_per_cpu_second=(40_000, True),
  bytes_per_sample=(4.01, False),
  open_cpu_seconds=(0.05, False),
  lookup_cpu_microseconds=(5, False),
  read_over_webdataset=(4, True),
  read_over_array_record=(1.2, True),
)


def images(root: str, count: int) -> list[bytes]:
  """Real pictures, scaled and encoded to about BYTES each."""
  found = []
  source = open_source(f"{root}/coco2k/train/*.tar", captions=())
  for i in range(count):
    picture = Image.open(io.BytesIO(source[i]["image"])).convert("RGB")
    scale, data = 1.0, b""
    while len(data) < 0.9 * BYTES:
      scale *= 1.1 if data else 500 / max(picture.size)
      size = (round(picture.width * scale), round(picture.height * scale))
      file = io.BytesIO()
      picture.resize(size, Image.Resampling.BICUBIC).save(file, "jpeg", quality=95)
      data = file.getvalue()
    found.append(data)
  return found


def write_shards(folder: pathlib.Path, pictures: list[bytes]) -> list[str]:
  """Tars of jpg, txt, json, and beside each an ArrayRecord of the same samples."""
  paths = []
  for shard in range(SHARDS):
    paths.append(str(folder / f"{shard:05d}.tar"))
    writer = ArrayRecordWriter(f"{folder}/{shard:05d}.array_record", "group_size:1")
    with tarfile.open(paths[-1], "w") as tar:
      for i in range(SAMPLES):
        members = dict(
          jpg=pictures[i % len(pictures)],
          txt=b"a picture of the world",
          json=json.dumps(dict(url="https://example.org", width=500)).encode(),
        )
        for field, data in members.items():
          info = tarfile.TarInfo(f"{i:09d}.{field}")
          info.size = len(data)
          tar.addfile(info, io.BytesIO(data))
        writer.write(msgpack.packb(members))
    writer.close()
  return paths


def build(path: str, folder: str) -> float:
  """Samples per CPU-second of indexing a shard."""
  began = time.process_time()
  part = index.index_shard(path, folder)
  return (part.entries - 1) / (time.process_time() - began)


def large(folder: pathlib.Path, path: str) -> dict[str, float]:
  """A set of 2e8 samples: the index is whole, the shards are links to one."""
  index.index_shard(path, str(folder))
  own = index.Index(str(folder / index.PARTS / f"{os.path.basename(path)}.index"))
  starts = np.tile(own.starts(0), -(-LARGE_SAMPLES // SAMPLES))[: LARGE_SAMPLES + 1].copy()
  parts = []
  for i in range(LARGE_SHARDS):
    name = f"{i:05d}.tar"
    parts.append(own.part(0)._replace(name=name, entries=LARGE_SAMPLES + 1))
    os.link(path, folder / name)
  file = folder / index.FILE
  index._write(str(file), parts, lambda out: [out.write(starts.data) for _ in parts])

  def open_set():
    return open_source(f"{folder}/{{00000..{LARGE_SHARDS - 1:05d}}}.tar", captions=())

  def cpu(run) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began

  source = open_set()
  ids = np.random.default_rng(0).integers(0, len(source), 20_000).tolist()

  def look_up():
    for i in ids:
      source.shards.span(i, source.shards.shard(i))

  before = resident()
  look_up()
  return dict(
    bytes_per_sample=file.stat().st_size / len(source),
    open_cpu_seconds=min(cpu(open_set) for _ in range(9)),
    lookup_cpu_microseconds=1e6 * min(cpu(look_up) for _ in range(5)) / len(ids),
    resident_mb_of_lookups=(resident() - before) / 1e6,
  )


def resident() -> int:
  """Bytes of this process in memory."""
  return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def readers(folder: pathlib.Path, paths: list[str]) -> dict[str, Callable[[], int]]:
  """Name → reads every sample once, and returns how many bytes of images it saw."""
  source = open_source(f"{folder}/*.tar")
  order = np.random.default_rng(0).permutation(len(source)).tolist()
  records = ArrayRecordDataSource([path.replace(".tar", ".array_record") for path in paths])
  made = dict(
    bigalign=lambda: sum(len(source[i]["image"]) for i in order),
    array_record=lambda: sum(len(msgpack.unpackb(records[i])["jpg"]) for i in order),
  )
  try:
    import webdataset
  except ImportError as error:
    print(f"without webdataset: {error}. It comes with pip install '.[bench]'")
  else:
    made["webdataset"] = lambda: sum(
      len(sample["jpg"]) for sample in webdataset.WebDataset(paths, shardshuffle=False)
    )
  return made


def compare(runs: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
  """Name → CPU-microseconds per sample, the median of the rounds."""
  seen = {name: run() for name, run in runs.items()}
  assert len(set(seen.values())) == 1, seen
  times: dict[str, list[float]] = {name: [] for name in runs}
  for _, (name, run) in itertools.product(range(rounds), runs.items()):
    began = time.process_time()
    run()
    times[name].append((time.process_time() - began) / (SAMPLES * SHARDS) * 1e6)
  return {name: statistics.median(found) for name, found in times.items()}


def main() -> int:
  """Prints the figures, writes the JSON; the exit status tells whether all bars are met."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=7, help="turns of each")
  parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("benchmarks/index.json"))
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
    folder = pathlib.Path(name)
    for part in ("shards", "large"):
      (folder / part).mkdir()
    os.environ["BIGALIGN_INDEX"] = str(folder / "index")
    paths = write_shards(folder / "shards", images(os.environ["BIGALIGN_DATA"], DISTINCT))
    run = functools.partial(build, paths[0], str(folder / "built"))
    figures = dict(build_samples_per_cpu_second=max(run() for _ in range(args.rounds)))
    figures |= large(folder / "large", paths[0])
    microseconds = compare(readers(folder / "shards", paths), args.rounds)
  figures |= {
    f"read_over_{name}": found / microseconds["bigalign"]
    for name, found in microseconds.items()
    if name != "bigalign"
  }
  missed = []
  for name, value in figures.items():
    bar, more = BARS.get(name, (None, True))
    if bar is not None and (value < bar if more else value > bar):
      missed.append(name)
    print(f"{name:<30}{value:>12.4g}   " + (f"bar {bar}" if bar else ""))
  print("CPU microseconds per read:", {name: round(us, 1) for name, us in microseconds.items()})
  print(f"missed: {', '.join(missed)}" if missed else "all bars met")
  args.json.write_text(
    json.dumps(
      dict(
        revision=revision(),
        machine=machine(),
        versions=runtime.versions(),
        bars=BARS,
        **figures,
        cpu_microseconds_per_read=microseconds,
        missed=missed,
      ),
      indent=1,
    )
    + "\n"
  )
  return int(bool(missed))


if __name__ == "__main__":
  sys.exit(main())
