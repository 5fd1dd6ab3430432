"""Batches of config.data on several hosts, to compare with those of one."""

from __future__ import annotations

import contextlib

import numpy as np
from helpers.batches import data_options

from bigalign.inputs import open_data

B, STEPS = 8, 4


def take(data: dict, count: int = STEPS, *, rows=range(B), start: int = 0):
  """The first `count` batches from a position on, of `rows` of the global batch of B."""
  inputs = open_data(data_options(**data))
  with contextlib.closing(
    inputs.batches(rejected_log="", batch_size=B, rows=rows, seed=3, start=start)
  ) as batches:
    return [next(batches) for _ in range(count)]


def assert_equal_on_hosts(data: dict, hosts: int, workers: int) -> None:
  """Batches of several hosts and workers, from the third step on, are those of one host."""
  whole, start = take(data), 2
  parts = [
    take(data | dict(workers=workers), STEPS - start, rows=np.arange(h, B, hosts), start=start * B)
    for h in range(hosts)
  ]
  order = np.argsort(np.concatenate([np.arange(h, B, hosts) for h in range(hosts)]))
  for step, expected in zip(zip(*parts), whole[start:], strict=True):
    assert step[0].keys() == expected.keys()
    for name, x in expected.items():
      together = np.concatenate([part[name] for part in step])[order]
      np.testing.assert_array_equal(together, x, err_msg=name)
