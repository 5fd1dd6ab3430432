from __future__ import annotations

import numpy as np
import pytest

from bigalign.data.order.permutation import philox, sample_index, substitute


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 16, 17, 1000, 100_003])
def test_every_epoch_holds_each_index_once(size):
  for epoch in range(3):
    positions = np.arange(epoch * size, (epoch + 1) * size)
    index = sample_index(positions, size=size, seed=7)
    np.testing.assert_array_equal(np.sort(index), np.arange(size))


def test_without_shuffle_the_order_is_the_source():
  np.testing.assert_array_equal(
    sample_index(np.arange(7), size=5, seed=7, shuffle=False), [0, 1, 2, 3, 4, 0, 1]
  )


def test_a_single_position_equals_the_position_in_a_batch():
  positions = np.arange(990, 1010)
  batch = sample_index(positions, size=100, seed=3)
  assert [sample_index(int(p), size=100, seed=3) for p in positions] == batch.tolist()
  np.testing.assert_array_equal(
    sample_index(positions.reshape(4, 5), size=100, seed=3), batch.reshape(4, 5)
  )


def test_ten_billion_samples_stay_distinct_and_in_range():
  size = 10**10 + 7
  positions = 5 * size + np.random.default_rng(0).permutation(10**5) * 100_000
  index = sample_index(positions, size=size, seed=1)
  assert len(np.unique(index)) == 10**5
  assert index.min() >= 0 and index.max() < size
  # Uniform on [0, size): mean within 5 standard errors.
  assert abs(index.mean() / size - 0.5) < 5 * np.sqrt(1 / 12 / 10**5)


def test_seed_and_epoch_do_not_add_up():
  """grain's shuffle repeats epoch 0 of seed s + 1 as epoch 1 of seed s."""
  size = 1000
  second = sample_index(np.arange(size, 2 * size), size=size, seed=4)
  assert (second == sample_index(np.arange(size), size=size, seed=5)).mean() < 0.02
  assert (second == sample_index(np.arange(size), size=size, seed=4)).mean() < 0.02


@pytest.mark.parametrize("size", [2, 5, 12])
def test_every_index_is_equally_likely_at_every_position(size):
  epochs = 6000
  index = sample_index(np.arange(epochs * size), size=size, seed=0).reshape(epochs, size)
  counts = np.stack([(index == i).sum(0) for i in range(size)])
  # Binomial; 5 standard deviations over at most 144 cells.
  assert np.abs(counts - epochs / size).max() < 5 * np.sqrt(epochs / size * (1 - 1 / size))


def test_neighbours_in_the_order_are_not_neighbours_in_the_source():
  size = 50_000
  index = sample_index(np.arange(size), size=size, seed=2).astype(float)
  for lag in (1, 2, 224):
    assert abs(np.corrcoef(index[lag:], index[:-lag])[0, 1]) < 5 / np.sqrt(size)


def test_substitutes_are_distinct_and_reach_all_of_a_small_source():
  for position in range(50):
    assert len({substitute(position, k, 100, 1) for k in range(1, 9)}) == 8
    assert {substitute(position, k, 3, 1) for k in range(1, 4)} == {0, 1, 2}
  assert substitute(5, 1, 10**6, 1) != substitute(6, 1, 10**6, 1)
  assert substitute(5, 1, 10**6, 1) != substitute(5, 1, 10**6, 2)


def test_draws_belong_to_the_position():
  draws = {philox(seed, position).random() for seed in (0, 1, -1) for position in range(100)}
  assert len(draws) == 300
  assert philox(1, 2**40).random() == philox(1, 2**40).random()


def test_bad_arguments_say_what_they_are():
  with pytest.raises(ValueError, match="size is 0"):
    sample_index(0, size=0, seed=0)
  with pytest.raises(ValueError, match="found -1"):
    sample_index(np.array([3, -1]), size=5, seed=0)
