"""Lists in errors are short: the first entries, and the number of the others."""

from __future__ import annotations

import doctest

import jax
import pytest

from bigalign import gradcache, sharding, tree


def test_examples():
  assert doctest.testmod(tree).failed == 0


def test_a_long_list_has_eight_entries_and_a_count():
  assert tree.shown(["a"] * 8) == f"{['a'] * 8}"
  assert tree.shown(iter(["a"] * 9)) == f"{['a'] * 8} and 1 more"
  assert tree.shown([]) == "[]"
  assert tree.shown(range(1000), sep=", ") == "0, 1, 2, 3, 4, 5, 6, 7 and 992 more"
  text = tree.shown(["x" * 100_000] * 1000)
  assert len(text) < 1000 and "(100000 characters)" in text and text.endswith("and 992 more")


@pytest.mark.parametrize(
  "fail",
  [
    lambda names: tree.partition(dict.fromkeys(names), "missing", "config.frozen"),
    lambda names: tree.match([("a", 1)], names),
    lambda names: tree.match([(".", 1), *((name, 2) for name in names)], names),
    lambda names: gradcache.check_microbatches(
      sharding.make_mesh(devices=jax.devices()[:1]), 5040, microbatches=11
    ),
  ],
)
def test_errors_list_few_of_many_names(fail):
  with pytest.raises(ValueError, match=r"and \d+ more") as error:
    fail([f"model/b/block_{i}/kernel" for i in range(300)])
  assert len(str(error.value)) < 1500
