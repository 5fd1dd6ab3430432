"""The random first values of the towers: CLIP's and big_vision's for texts, ViT's for images."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigalign import tree
from bigalign.towers import TOWERS

D, DEPTH = 64, 3
SIZE = dict(width=D, depth=DEPTH, heads=4, dtype="float32")
CLIP = {
  "embedding": 0.02,
  "positions": 0.01,
  "attn/query/kernel": D**-0.5,
  "attn/key/kernel": D**-0.5,
  "attn/value/kernel": D**-0.5,
  "attn/out/kernel": (2 * DEPTH * D) ** -0.5,
  "mlp/fc1/kernel": (2 * D) ** -0.5,
  "mlp/fc2/kernel": (2 * DEPTH * D) ** -0.5,
}
XAVIER = {"attn": D**-0.5, "mlp": (2 / (5 * D)) ** 0.5}
BIG_VISION = {
  "embedding": D**-0.5,
  "positions": D**-0.5,
  **{path: XAVIER[path.split("/")[0]] for path in CLIP if path.endswith("kernel")},
}


def first_values(name, inputs, **options):
  tower = TOWERS[name](**SIZE, **options).build()
  return tree.flatten(jax.jit(tower.init)(jax.random.key(0), inputs)["params"])


@pytest.mark.parametrize(
  "options, expected", [({}, CLIP), ({"weight_init": "big_vision"}, BIG_VISION)]
)
def test_a_text_tower_begins_as_clip_or_as_big_vision(options, expected):
  params = first_values("text", jnp.zeros((1, 40), int), vocab_size=300, length=40, **options)
  for path, spread in expected.items():
    (found,) = (x for name, x in params.items() if name.endswith(path))
    np.testing.assert_allclose(np.std(found), spread, rtol=0.05, err_msg=path)
  rest = [path for path in params if not path.endswith(tuple(expected))]
  assert all(np.abs(params[path] - path.endswith("scale")).max() < 1e-5 for path in rest)


@pytest.mark.slow
def test_an_image_tower_begins_as_vit():
  params = first_values("vit", jnp.zeros((1, 64, 64, 3)), patch=8, pool="cls", class_position=True)
  spreads = {
    "embedding/kernel": (8 * 8 * 3) ** -0.5,
    "positions": D**-0.5,
    "extra_tokens": 0.02,
    **{f"encoder/blocks/{path}": x for path, x in BIG_VISION.items() if path.endswith("kernel")},
  }
  for path, spread in spreads.items():
    rtol = 0.25 if path == "extra_tokens" else 0.05  # one vector of 64 numbers
    np.testing.assert_allclose(np.std(params[path]), spread, rtol=rtol, err_msg=path)
  assert not params["class_position"].any()


def test_other_first_values_are_refused():
  with pytest.raises(
    ValueError, match=r"text\.weight_init: unknown 'xavier'; known: \['big_vision'"
  ):
    TOWERS["text"](vocab_size=9, length=4, weight_init="xavier")
