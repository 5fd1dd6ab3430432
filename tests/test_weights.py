"""Pretrained towers against the outputs that their own libraries gave, and round trips."""

from __future__ import annotations

import json
import math
import os
import pathlib

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigalign import tree, weights
from bigalign.model import make_model, unit
from bigalign.towers import TOWERS
from bigalign.weights import load

ROOT = pathlib.Path(os.environ.get("BIGALIGN_TOWER_ORACLES", "../shared/oracles/towers"))
INDEX = json.loads((ROOT / "index.json").read_text()) if (ROOT / "index.json").is_file() else {}
KEY = jax.random.key(0)
TOLERANCE = 2e-5

pytestmark = pytest.mark.skipif(
  not INDEX, reason="BIGALIGN_TOWER_ORACLES names no folder with index.json"
)
CASES = INDEX.get("cases", ["none"])


def describe(case, **options):
  """open_clip does not save how many heads a timm or Hugging Face tower has."""
  path = ROOT / case
  file = path / "open_clip_config.json"
  extra = {"image": {}, "text": {}}
  if file.is_file():
    config = json.loads(file.read_text())["model_cfg"]
    if "timm_model_name" in config["vision_cfg"]:
      extra["image"]["heads"] = INDEX["vision"]["heads"]
    if "hf_model_name" in config["text_cfg"]:
      extra["text"]["heads"] = INDEX["text"]["heads"]
  for side, more in options.items():
    extra[side] |= more
  if (path / "weights.npz").is_file():
    path = path / "weights.npz"
  return weights.describe(path, **{k: v for k, v in extra.items() if v})


def inputs(io):
  return {k: np.asarray(io[k]) for k in io.files if not k.startswith("out_")}


def images(io, name="pixel_values"):
  """[B, C, H, W] of torch as [B, H, W, C]; NaFlex patches as they are."""
  x = io[name]
  return x if x.ndim == 3 else einops.rearrange(x, "b c h w -> b h w c")


class Side:
  """One tower of a checkpoint with its projector, read for inputs of one size."""

  def __init__(self, checkpoint, side, example, **options):
    model = checkpoint.model
    given = {**model[side], "dtype": "float32", **options.pop("tower", {})}
    self.tower = TOWERS[given.pop("name")](**given)
    shapes = jax.eval_shape(self.tower.init, KEY, *example)["params"]
    flat = tree.flatten(shapes, f"{side}_tower/")
    self.projector = None
    if f"{side}_projector" in model:
      # A model's own projector; its width is the tower's.
      other = dict(image=dict(name="vit", width=8, heads=2, depth=1), text=dict(
        name="text", vocab_size=8, length=4, width=8, heads=2, depth=1))
      both = {**other, side: model[side]}
      made = make_model(
        **both, embed_dim=model["embed_dim"],
        **{f"{side}_projector": model[f"{side}_projector"]},
      )
      self.projector = getattr(made, f"{side}_projector")
      pooled = jnp.zeros((1, self.tower.width))
      shapes = jax.eval_shape(self.projector.init, KEY, pooled).get("params", {})
      flat |= tree.flatten(shapes, f"{side}_projector/")
    self.side, self.flat = side, checkpoint.load(flat, **options)

  def __call__(self, flat, *args, **kwargs):
    """TowerOutput, all tokens normed, the projected vector."""
    params = tree.unflatten(tree.subtree(flat, f"{self.side}_tower/"))
    out, state = self.tower.apply(
      {"params": params}, *args, **kwargs,
      capture_intermediates=lambda module, _: module.name == "encoder",
    )
    every = state["intermediates"]["encoder"]["__call__"][0]
    if self.projector is None:
      return out, every, None
    params = tree.unflatten(tree.subtree(flat, f"{self.side}_projector/"))
    return out, every, self.projector.apply({"params": params}, out.pooled)


def normed(x, flat, prefix, epsilon):
  """Layer norm in numpy."""
  x = x.astype(np.float64)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
  return x * flat[f"{prefix}/scale"] + flat[f"{prefix}/bias"]


def image_outputs(case, checkpoint, io):
  """{name of a stored output: ours}, and the unit vectors."""
  found, arrays = {}, inputs(io)
  for suffix in [""] + [k.removeprefix("pixel_values") for k in arrays if "values_" in k]:
    x = images(io, f"pixel_values{suffix}")
    args, options = (x,), {}
    if x.ndim == 3:
      args = (x, arrays["pixel_attention_mask"], arrays["spatial_shapes"])
    else:
      patch = checkpoint.model["image"]["patch"]
      options["grid"] = tuple(n // patch for n in x.shape[1:3])
    side = Side(checkpoint, "image", args, **options)
    out, every, projected = jax.jit(side)(side.flat, *args)
    if x.ndim == 3:
      every = every * arrays["pixel_attention_mask"][..., None]
    found[f"out_vision_pooler{suffix}"] = found[f"out_pooler{suffix}"] = out.pooled
    found[f"out_vision_last_hidden_state{suffix}"] = every
    found[f"out_last_hidden_state{suffix}"] = every
    if projected is not None and not suffix:
      found["out_image_features"], found["out_image_embeds"] = projected, unit(projected)
    if checkpoint.kind == "clip" and not suffix:
      stored = "out_vision_last_hidden_state"  # before the last norm
      epsilon = checkpoint.model["image"]["epsilon"]
      found[f"normed {stored}"] = normed(io[stored], side.flat, "image_tower/encoder/ln", epsilon)
  return found


def text_outputs(case, checkpoint, io):
  found, arrays = {}, inputs(io)
  ids, mask = arrays["input_ids"].astype(np.int32), arrays.get("attention_mask")
  mask = None if mask is None else mask.astype(bool)
  side = Side(checkpoint, "text", (ids, mask))
  out, _, projected = jax.jit(side)(side.flat, ids, mask)
  tokens = out.tokens if mask is None else out.tokens * mask[..., None]
  found["out_text_last_hidden_state"] = found["out_last_hidden_state"] = tokens
  found["out_text_pooler"] = found["out_pooler"] = out.pooled
  if projected is not None:
    found["out_text_features"], found["out_text_embeds"] = projected, unit(projected)
    if checkpoint.kind.startswith("siglip"):
      found["out_text_pooler"] = projected  # theirs is behind the head
  if "out_text_embeds_nomask" in io:
    found["out_text_embeds_nomask"] = unit(jax.jit(side)(side.flat, ids, None)[2])
  if "out_mean" in io:
    for name, tower in (
      ("out_mean", dict(pool="mean", unit=False)), ("out_cls", dict(pool="cls", unit=False)),
      ("out_mean_normalized", dict(pool="mean", unit=True)),
      ("out_pooler", dict(pool="pooler", unit=False)),
    ):
      one = Side(checkpoint, "text", (ids, mask), tower=tower)
      found[name] = jax.jit(one)(one.flat, ids, mask)[0].pooled
    if (ROOT / case / "modules.json").is_file():
      np.testing.assert_array_equal(out.pooled, found["out_mean_normalized"])
  if "token_type_ids" in arrays:
    types = arrays["token_type_ids"].astype(np.int32)
    typed = jax.jit(side)(side.flat, ids, mask, types=types)[0].tokens
    found["out_last_hidden_state_tt"] = typed * mask[..., None]
  return found


def error(ours, theirs):
  """Largest difference, relative to the largest output."""
  assert ours.shape == theirs.shape
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def compared(case, io):
  """{name of a stored output: relative error}."""
  checkpoint = describe(case)
  ours = {}
  if "image" in checkpoint.model:
    ours |= image_outputs(case, checkpoint, io)
  if "text" in checkpoint.model:
    ours |= text_outputs(case, checkpoint, io)
  if "out_image_embeds" in ours and "out_text_embeds" in ours:
    scalars = {row.ours for row in checkpoint.layout.rows} & {"t", "b"}
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    loss = checkpoint.load({name: scalar for name in scalars})
    cosines = ours["out_image_embeds"] @ ours["out_text_embeds"].T
    logits = np.exp(loss["t"]) * cosines + loss.get("b", 0)
    ours |= {"out_logits_per_image": logits, "out_logits_per_text": logits.T}
  errors = {}
  for name in (x for x in io.files if x.startswith("out_")):
    theirs = io[name]
    if f"normed {name}" in ours:
      theirs = ours[f"normed {name}"]
    errors[name] = error(ours[name], theirs)
  return errors


@pytest.mark.parametrize("case", [*CASES, "bv_siglip_npz"])
def test_tower_oracle(case):
  """Every stored output of a checkpoint, from its own config and weights."""
  io = ROOT / case / "io.npz"
  if not io.is_file():
    meta = json.loads((ROOT / case / "meta.json").read_text())
    io = ROOT / case / meta["inputs_and_outputs"]
  with jax.default_matmul_precision("highest"), np.load(io) as arrays:
    skipped = ["pixel_values_interp"] if case == "bv_siglip_npz" else []
    errors = compared(case, _Without(arrays, skipped))
  print(case, f"{max(errors.values()):.1e}")
  assert errors and max(errors.values()) <= TOLERANCE, errors


class _Without:
  """An npz without the arrays that another library made otherwise."""

  def __init__(self, arrays, names):
    self._arrays = arrays
    self.files = [
      x for x in arrays.files if x not in names and not (names and x.endswith("_interp"))
    ]

  def __getitem__(self, name):
    return self._arrays[name]

  def __contains__(self, name):
    return name in self.files
