"""Runs our towers on the stored inputs of checkpoints and compares the outputs."""

from __future__ import annotations

import json
import os
import pathlib

import einops
import jax
import jax.numpy as jnp
import numpy as np

from bigalign import tree, weights
from bigalign.model import make_model, unit
from bigalign.towers import TOWERS, TowerOutput

# Made by tests/expected/make_towers.py.
SMALL = pathlib.Path(__file__).parents[1] / "expected/towers"
ROOT = pathlib.Path(os.environ.get("BIGALIGN_TOWER_ORACLES") or SMALL)
INDEX = json.loads((ROOT / "index.json").read_text())
CASES = sorted(
  x.parent.name
  for x in ROOT.glob("*/meta.json")
  if any(file.suffix == ".safetensors" or file.name == "weights.npz" for file in x.parent.iterdir())
)
KEY = jax.random.key(0)


def describe(case, **options):
  """The description of a checkpoint, with options per side.

  open_clip does not save how many heads a timm or Hugging Face tower has: index.json does.
  """
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


def images(io, name="pixel_values"):
  """Images of torch, [B, C, H, W], as [B, H, W, C]; NaFlex patches unchanged."""
  x = io[name]
  return x if x.ndim == 3 else einops.rearrange(x, "b c h w -> b h w c")


class Side:
  """One tower of a checkpoint and its projector, for inputs of one size."""

  def __init__(self, checkpoint, side, example, tower=None, **options):
    model = checkpoint.model
    given = {**model[side], "dtype": "float32", **(tower or {})}
    self.tower = TOWERS[given.pop("name")](**given).build()
    shapes = jax.eval_shape(self.tower.init, KEY, *example)["params"]
    flat = tree.flatten(shapes, f"{side}_tower/")
    self.projector = None
    if f"{side}_projector" in model:
      # A model's own projector; its width is the tower's.
      other = dict(
        image=dict(name="vit", width=8, heads=2, depth=1),
        text=dict(name="text", vocab_size=8, length=4, width=8, heads=2, depth=1),
      )
      both = {**other, side: model[side]}
      made = make_model(
        **both,
        embed_dim=model["embed_dim"],
        **{f"{side}_projector": model[f"{side}_projector"]},
      )
      self.projector = getattr(made, f"{side}_projector")
      width = self.tower.options.token_width
      out = TowerOutput(jnp.zeros((1, width)), jnp.zeros((1, 1, width)))
      shapes = jax.eval_shape(self.projector.init, KEY, out).get("params", {})
      flat |= tree.flatten(shapes, f"{side}_projector/")
    self.side, self.flat = side, checkpoint.load(flat, **options)

  def __call__(self, flat, *args, **kwargs):
    """Returns the TowerOutput, all tokens after the last norm, and the projected vector."""
    params = tree.unflatten(tree.subtree(flat, f"{self.side}_tower/"))
    out, state = self.tower.apply(
      {"params": params},
      *args,
      **kwargs,
      capture_intermediates=lambda module, _: module.name == "encoder",
    )
    every = state["intermediates"]["encoder"]["__call__"][0]
    if self.projector is None:
      return out, every, None
    params = tree.unflatten(tree.subtree(flat, f"{self.side}_projector/"))
    return out, every, self.projector.apply({"params": params}, out)


def normed(x, flat, prefix, epsilon):
  """Layer norm in numpy."""
  x = x.astype(np.float64)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
  return x * flat[f"{prefix}/scale"] + flat[f"{prefix}/bias"]


def image_outputs(checkpoint, io):
  """{name of a stored output: our output}, for images."""
  outputs = {}
  for name in [x for x in io if x.startswith("pixel_values")]:
    suffix, x = name.removeprefix("pixel_values"), images(io, name)
    args, options = (x,), {}
    if x.ndim == 3:
      args = (x, io["pixel_attention_mask"], io["spatial_shapes"])
    else:
      patch = checkpoint.model["image"]["patch"]
      options["grid"] = tuple(n // patch for n in x.shape[1:3])
    side = Side(checkpoint, "image", args, **options)
    out, every, projected = jax.jit(side)(side.flat, *args)
    if x.ndim == 3:
      every = every * io["pixel_attention_mask"][..., None]
    outputs[f"out_vision_pooler{suffix}"] = outputs[f"out_pooler{suffix}"] = out.pooled
    outputs[f"out_vision_last_hidden_state{suffix}"] = every
    outputs[f"out_last_hidden_state{suffix}"] = every
    if projected is not None and not suffix:
      outputs["out_image_features"], outputs["out_image_embeds"] = projected, unit(projected)
    if checkpoint.kind == "clip" and not suffix:
      stored = "out_vision_last_hidden_state"  # before the last norm
      epsilon = checkpoint.model["image"]["epsilon"]
      outputs[f"normed {stored}"] = normed(io[stored], side.flat, "image_tower/encoder/ln", epsilon)
  return outputs


def text_outputs(case, checkpoint, io):
  """{name of a stored output: our output}, for texts."""
  outputs = {}
  ids, mask = io["input_ids"].astype(np.int32), io.get("attention_mask")
  mask = None if mask is None else mask.astype(bool)
  side = Side(checkpoint, "text", (ids, mask))
  out, _, projected = jax.jit(side)(side.flat, ids, mask)
  tokens = out.tokens if mask is None else out.tokens * mask[..., None]
  outputs["out_text_last_hidden_state"] = outputs["out_last_hidden_state"] = tokens
  outputs["out_text_pooler"] = outputs["out_pooler"] = out.pooled
  if projected is not None:
    outputs["out_text_features"], outputs["out_text_embeds"] = projected, unit(projected)
    if checkpoint.kind in ("siglip", "siglip2", "big_vision"):
      outputs["out_text_pooler"] = projected  # SigLIP's pooler output is the projected vector
  if "out_text_embeds_nomask" in io:
    outputs["out_text_embeds_nomask"] = unit(jax.jit(side)(side.flat, ids, None)[2])
  if "out_mean" in io:
    outputs |= pooled(tokens, mask)
  if (ROOT / case / "modules.json").is_file():
    np.testing.assert_allclose(out.pooled, outputs["out_mean_normalized"], atol=1e-6)
    for pool in ("mean", "cls", "pooler"):
      one = Side(checkpoint, "text", (ids, mask), tower=dict(pool=pool, unit=False))
      outputs[f"out_{pool}"] = jax.jit(one)(one.flat, ids, mask)[0].pooled
  if "token_type_ids" in io:
    types = io["token_type_ids"].astype(np.int32)
    typed = jax.jit(side)(side.flat, ids, mask, types=types)[0].tokens
    outputs["out_last_hidden_state_tt"] = typed * mask[..., None]
  return outputs


def pooled(tokens, mask):
  """The tokens of texts pooled in other ways, in numpy."""
  tokens = np.asarray(tokens, np.float64)
  mean = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
  normal = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
  return {"out_mean": mean, "out_mean_normalized": normal, "out_cls": tokens[:, 0]}


def error(ours, theirs):
  """The largest difference, relative to the largest output."""
  assert ours.shape == theirs.shape
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def stored(case):
  """{name: array} of the stored inputs and outputs."""
  meta = json.loads((ROOT / case / "meta.json").read_text())
  with np.load(ROOT / case / meta.get("inputs_and_outputs", "io.npz")) as io:
    return dict(io)


def compared(case):
  """{name of a stored output: relative error of ours}."""
  checkpoint, io = describe(case), stored(case)
  if checkpoint.kind == "big_vision":
    # Hugging Face made the outputs for resized images, and it resizes positions differently.
    io = {name: x for name, x in io.items() if not name.endswith("_interp")}
  ours = {}
  if "image" in checkpoint.model:
    ours |= image_outputs(checkpoint, io)
  if "text" in checkpoint.model:
    ours |= text_outputs(case, checkpoint, io)
  if "out_image_embeds" in ours and "out_text_embeds" in ours:
    loss = scalars(checkpoint)
    cosines = ours["out_image_embeds"] @ ours["out_text_embeds"].T
    logits = np.exp(loss["t"]) * cosines + loss.get("b", 0)
    ours |= {"out_logits_per_image": logits, "out_logits_per_text": logits.T}
  errors = {}
  for name in (x for x in io if x.startswith("out_")):
    errors[name] = error(ours[name], ours.get(f"normed {name}", io[name]))
  return errors


def scalars(checkpoint):
  """The learned scalars of the loss."""
  names = {row.ours for row in checkpoint.layout.rows} & {"t", "b"}
  return checkpoint.load({name: jax.ShapeDtypeStruct((), jnp.float32) for name in names})
