"""Builds, opens and reads indexed shards: BIGALIGN_DATA=... python benchmarks/index.py

Random reads of indexed tars are compared with sequential reads of webdataset and random reads of
ArrayRecord, in turns. Without webdataset (`make bench` installs it) its part is left out. The
images are photos, re-encoded to about 110 KB. All times are CPU time, because other programs on the
machine lengthen wall time. The exit status is 1 if a figure misses its target.
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
from step import made_by

from bigalign.data.sources.base import open_source
from bigalign.data.tar import index
from bigalign.run import runtime

BYTES = 110_000  # of an image
DISTINCT, SAMPLES, SHARDS = 128, 1024, 2  # images; samples per shard
LARGE_SHARDS, LARGE_SAMPLES = 20_000, 10_000  # 2e8 samples
# {name: (target, whether more is better)}
TARGETS = dict(
  build_samples_per_cpu_second=(40_000, True),
  bytes_per_sample=(4.01, False),
  open_cpu_seconds=(0.05, False),
  lookup_cpu_microseconds=(5, False),
  read_over_webdataset=(4, True),
  read_over_array_record=(1.2, True),
)


def images(root: str, count: int) -> list[bytes]:
  """Returns photos, scaled and encoded to about BYTES each."""
  encoded = []
  source = open_source(f"{root}/coco2k/train/*.tar", captions=())
  for i in range(count):
    image = Image.open(io.BytesIO(source[i]["image"])).convert("RGB")
    scale, data = 1.0, b""
    while len(data) < 0.9 * BYTES:
      scale *= 1.1 if data else 500 / max(image.size)
      size = (round(image.width * scale), round(image.height * scale))
      file = io.BytesIO()
      image.resize(size, Image.Resampling.BICUBIC).save(file, "jpeg", quality=95)
      data = file.getvalue()
    encoded.append(data)
  return encoded


def write_shards(folder: pathlib.Path, images: list[bytes]) -> list[str]:
  """Writes tars of jpg, txt and json, and ArrayRecords of the same samples; returns the tars."""
  paths = []
  for shard in range(SHARDS):
    paths.append(str(folder / f"{shard:05d}.tar"))
    writer = ArrayRecordWriter(f"{folder}/{shard:05d}.array_record", "group_size:1")
    with tarfile.open(paths[-1], "w") as tar:
      for i in range(SAMPLES):
        members = dict(
          jpg=images[i % len(images)],
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
  """Returns samples per CPU-second of indexing a shard."""
  began = time.process_time()
  part = index.index_shard(path, folder)
  return (part.entries - 1) / (time.process_time() - began)


def large(folder: pathlib.Path, path: str) -> dict[str, float]:
  """Measures a set of 2e8 samples: the index is complete, the shards are links to one shard."""
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
  """Returns the resident memory of this process in bytes."""
  return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def readers(folder: pathlib.Path, paths: list[str]) -> dict[str, Callable[[], int]]:
  """Returns {name: function that reads every sample once, and returns the bytes of the images}."""
  source = open_source(f"{folder}/*.tar")
  order = np.random.default_rng(0).permutation(len(source)).tolist()
  records = ArrayRecordDataSource([path.replace(".tar", ".array_record") for path in paths])
  functions: dict[str, Callable[[], int]] = dict(
    bigalign=lambda: sum(len(source[i]["image"]) for i in order),
    array_record=lambda: sum(len(msgpack.unpackb(records[i])["jpg"]) for i in order),
  )
  try:
    import webdataset
  except ImportError as error:
    print(f"without webdataset: {error}. `make bench` installs it")
  else:
    functions["webdataset"] = lambda: sum(
      len(sample["jpg"]) for sample in webdataset.WebDataset(paths, shardshuffle=False)
    )
  return functions


def compare(functions: dict[str, Callable[[], int]], rounds: int) -> tuple[dict[str, float], float]:
  """Returns {name: CPU-microseconds per sample, median of the rounds}, and bytes of an image."""
  totals = {name: run() for name, run in functions.items()}
  assert len(set(totals.values())) == 1, totals
  times: dict[str, list[float]] = {name: [] for name in functions}
  for _, (name, run) in itertools.product(range(rounds), functions.items()):
    began = time.process_time()
    run()
    times[name].append((time.process_time() - began) / (SAMPLES * SHARDS) * 1e6)
  mean_bytes = totals["bigalign"] / (SAMPLES * SHARDS)
  return {name: statistics.median(values) for name, values in times.items()}, mean_bytes


def main() -> int:
  """Prints the figures and writes the JSON; returns 1 if a target is missed."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=7, help="rounds; the median counts")
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
    microseconds, mean_bytes = compare(readers(folder / "shards", paths), args.rounds)
  figures["read_gb_per_cpu_second"] = mean_bytes / microseconds["bigalign"] / 1e3
  figures |= {
    f"read_over_{name}": value / microseconds["bigalign"]
    for name, value in microseconds.items()
    if name != "bigalign"
  }
  missed = []
  for name, value in figures.items():
    target, more = TARGETS.get(name, (None, True))
    if target is not None and (value < target if more else value > target):
      missed.append(name)
    print(f"{name:<30}{value:>12.4g}   " + (f"target {target}" if target else ""))
  print("CPU microseconds per read:", {name: round(us, 1) for name, us in microseconds.items()})
  print(f"missed: {', '.join(missed)}" if missed else "all targets met")
  args.json.write_text(
    json.dumps(
      dict(
        **made_by(runtime.versions()),
        targets=TARGETS,
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
