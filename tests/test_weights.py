"""Pretrained towers against the outputs that their own libraries gave; round trips; mistakes."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from tower_oracles import CASES, Side, compared, describe, images, needed, scalars, stored

from bigalign.weights import load

TOLERANCE = 2e-5  # relative to the largest output
cases = pytest.mark.parametrize("case", CASES or ["none"])


@needed
@cases
def test_tower_oracle(case):
  """Every stored output of a checkpoint, from its own config and weights."""
  with jax.default_matmul_precision("highest"):
    errors = compared(case)
  print(f"{case} {max(errors.values()):.1e}")
  assert errors and max(errors.values()) <= TOLERANCE, errors


def read(case, **tower):
  """All that a checkpoint holds, as ours, and the checkpoint."""
  checkpoint, io = describe(case), stored(case)
  arrays = scalars(checkpoint)
  if "image" in checkpoint.model:
    x = images(io)
    masks = (io["pixel_attention_mask"], io["spatial_shapes"]) if x.ndim == 3 else ()
    arrays |= Side(checkpoint, "image", (x, *masks), tower).flat
  if "text" in checkpoint.model:
    arrays |= Side(checkpoint, "text", (io["input_ids"].astype(np.int32),), tower).flat
  return checkpoint, arrays


@needed
@cases
def test_tower_oracle_round_trip(case):
  """theirs -> ours -> theirs, to the bit; what no forward pass uses comes back as zeros.

  A pooler that the sentence encoder does not read is left out, as Hugging Face's own writer may.
  """
  checkpoint, arrays = read(case)
  back = dict(load.write(checkpoint.layout, arrays))
  spare = {row.theirs for row in checkpoint.layout.rows if row.optional} - back.keys()
  for key in checkpoint.tensors.keys() - spare:
    theirs = checkpoint.tensors.read(key)
    expected = np.zeros_like(theirs) if key in checkpoint.layout.zeros else theirs
    assert back[key].dtype == theirs.dtype and back[key].shape == theirs.shape
    np.testing.assert_array_equal(back.pop(key), expected, err_msg=key)
  assert not back.keys() - checkpoint.layout.zeros.keys()


@needed
@pytest.mark.parametrize("case", [
  pytest.param(case, marks=[pytest.mark.slow] * (i > 0)) for i, case in enumerate(CASES)
])
def test_tower_oracle_layers_are_stacked_alike(case):
  """What scan=True reads is what scan=False reads, layer by layer; both are written alike."""
  checkpoint, stacked = read(case, scan=True)
  _, separate = read(case, scan=False)
  assert any("/block_1/" in path for path in separate)
  both = (dict(load.write(checkpoint.layout, x)) for x in (stacked, separate))
  jax.tree.map(np.testing.assert_array_equal, *both)
  for path, x in separate.items():
    i = re.search(r"block_(\d+)", path)
    y = stacked[re.sub(r"block_\d+", "blocks", path)]
    np.testing.assert_array_equal(x, y[int(i[1])] if i else y, err_msg=path)
