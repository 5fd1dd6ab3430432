"""Marks of tests that use libtpu, which compiles for TPUs without one."""

from __future__ import annotations

import pytest

from bigalign.plan import topologies

needs_libtpu = pytest.mark.skipif(
  not topologies.installed(), reason="libtpu is not installed: the extra plan"
)
# libtpu ends the process when it meets the XLA flag that conftest.py sets for all other tests.
compiles_for_tpus = [pytest.mark.optimized, needs_libtpu]


def compiled_for_tpus(test):
  """Marks `test` as one that compiles with libtpu in its own process."""
  for mark in compiles_for_tpus:
    test = mark(test)
  return test
