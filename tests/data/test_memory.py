"""What data workers hold does not grow with what they have made."""

from __future__ import annotations

import contextlib
import multiprocessing
import pathlib

import numpy as np
import pytest
from helpers.batches import train_batches
from helpers.every_format import write_array_records, write_parquet
from helpers.small_shards import picture, samples, write_tar

from bigalign.data.sources.base import open_source


def resident() -> int:
  """Bytes of all data workers of this process."""
  status = [
    pathlib.Path(f"/proc/{child.pid}/status").read_text()
    for child in multiprocessing.active_children()
  ]
  assert len(status) == 1
  return sum(1024 * int(text.split("VmRSS:")[1].split()[0]) for text in status)


@pytest.mark.slow
def test_a_worker_does_not_grow(tmp_path):
  """5,000 batches of every kind of file, with bad samples, take less than 100 bytes each."""
  write_tar(tmp_path / "0.tar", [*samples(0, 40), ("bad.jpg", b"<html>"), ("bad.txt", b"a page")])
  records = [dict(image=picture(i), captions=(f"picture {i}",), label=0) for i in range(40)]
  parts = [
    f"{tmp_path}/0.tar",
    write_parquet(tmp_path / "p", records, rows=7),
    write_array_records(tmp_path / "a", records),
  ]
  with contextlib.closing(
    train_batches(
      open_source("::".join(parts)),
      batch_size=2,
      rows=np.arange(2),
      seed=0,
      image_size=16,
      tokenizer=dict(name="byte", length=16),
      workers=1,
    )
  ) as batches:
    for _ in range(1000):
      next(batches)
    before = resident()
    for _ in range(5000):
      next(batches)
    assert resident() - before < 500_000
