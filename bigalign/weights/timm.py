"""timm's vision transformers as the trunks of open_clip's models.

Their configs are code in timm, so all that tensors show is read off the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bigalign.weights import table
from bigalign.weights.layout import Layout, Shapes, sizes
from bigalign.weights.table import Row

OURS = "image_tower/"
# Heads of models whose heads are not 64 wide, timm's and Hugging Face's.
_HEADS = {r"so400m|giantopt|huge|gigantic|giant_patch14_clip": 16, r"MiniLM": 12}


def dims(shapes: Shapes, key: str, count: int) -> tuple[int, ...]:
  """The shape of a tensor of `count` axes."""
  if key not in shapes:
    raise ValueError(f"{key}: is missing")
  shape = tuple(shapes[key].shape)
  if len(shape) != count or not all(shape):
    raise ValueError(f"{key}: {list(shape)} must have {count} axes")
  return shape


def depth(shapes: Shapes, start: str, end: str = ".") -> int:
  """The number of layers "start0.", "start1." …"""
  found = (re.match(rf"{re.escape(start)}(\d{{1,6}}){re.escape(end)}", key) for key in shapes)
  return max((int(x[1]) + 1 for x in found if x), default=0)


def count_heads(width: int, given: int | None, name: str = "") -> int:
  """Heads are in no tensor: those given, those of a known model, or of 64 channels each."""
  known = next((n for pattern, n in _HEADS.items() if re.search(pattern, name)), None)
  count = given or known or width // 64
  if not count or width % count or (not given and not known and width % 64):
    raise ValueError(
      f"heads: unknown for a width of {width}, and the checkpoint does not say; give heads="
    )
  return count


def projector(
  side: str, kinds: Mapping[Any, Mapping[str, tuple[str, bool]]], kind: Any, option: str,
  shapes: Shapes,
) -> tuple[dict[str, Any], tuple[Row, ...]]:
  """(options, rows) of a projector, one of {kind: {our layer: (their name, whether with bias)}}."""
  if kind not in kinds:
    raise ValueError(f"{option}: {kind!r}; known: {list(kinds)}")
  layers = kinds[kind]
  rows = tuple(
    row for name, (theirs, bias) in layers.items()
    for row in table.dense(f"{side}_projector/{name}", theirs, bias=bias)
  )
  if not layers:
    return dict(name="identity"), ()
  if "out" in layers:
    return dict(name="linear", bias=layers["out"][1]), rows
  hidden = dims(shapes, f"{layers['fc1'][0]}.weight", 2)[0]
  first, last = layers["fc1"][1], layers["fc2"][1]
  return dict(name="mlp", hidden=hidden, bias=first, out_bias=last), rows


def trunk(
  shapes: Shapes,
  act: str,
  *,
  timm_model_name: str,
  timm_pool: str = "avg",
  timm_proj: str | None = "linear",
  timm_proj_bias: bool = False,
  timm_model_kwargs: Any = None,
  image_size: Any = 224,
  heads: int | None = None,
  **_: Any,
) -> Layout:
  """A vision_cfg with a timm model: SigLIP's (attention pooling) or DINOv2's (class token) kind."""
  p = "visual.trunk."
  width, patch = dims(shapes, f"{p}patch_embed.proj.weight", 4)[::2]
  hidden = dims(shapes, f"{p}blocks.0.mlp.fc1.weight", 2)[0]
  gated = hidden == 2 * dims(shapes, f"{p}blocks.0.mlp.fc2.weight", 2)[1]
  hidden //= 1 + gated
  n = depth(shapes, f"{p}blocks.")
  count = count_heads(width, heads, timm_model_name)
  has_class, has_map = f"{p}cls_token" in shapes, f"{p}attn_pool.latent" in shapes
  registers = dims(shapes, f"{p}reg_token", 3)[1] if f"{p}reg_token" in shapes else 0
  pool = _pool(timm_pool, has_class, has_map)
  act = _activation(timm_model_kwargs)
  scaled = f"{p}blocks.0.ls1.gamma" in shapes
  biases = "qkvo" if f"{p}blocks.0.attn.qkv.bias" in shapes else "o"
  options: dict[str, Any] = dict(
    name="vit", patch=patch, pool=pool, class_token=has_class,
    class_position=has_class and not registers, registers=registers, biases=biases, gated=gated,
    activation="silu" if gated else act, layer_scale=1.0 if scaled else None,
    pre_norm=f"{p}norm_pre.weight" in shapes, **sizes(width, n, count, hidden),
  )
  rows = [
    *table.conv(f"{OURS}embedding", f"{p}patch_embed.proj"),
    _positions(p, options["class_position"]),
    *(table.norm(f"{OURS}ln_pre", f"{p}norm_pre") if options["pre_norm"] else ()),
    *_blocks(p, n, gated, biases, scaled),
    *table.norm(f"{OURS}encoder/ln", f"{p}norm"),
    *(_map_head(p) if has_map else ()),
  ]
  if has_class:
    keys = (f"{p}cls_token", f"{p}reg_token")
    rows.append(
      Row(f"{OURS}extra_tokens", keys, "1 n d -> 1 n d") if registers
      else Row(f"{OURS}extra_tokens", keys[0])
    )
  projected, projection = projector("image", {
    "none": {}, "": {}, None: {}, "linear": {"out": ("visual.head.proj", timm_proj_bias)},
    "mlp": {
      "fc1": ("visual.head.mlp.fc1", True), "fc2": ("visual.head.mlp.fc2", timm_proj_bias)
    },
  }, timm_proj, "timm_proj", shapes)
  return Layout(
    {"image": options, "image_projector": projected, "pixels": "half" if has_map else "clip"},
    (*rows, *projection), data={"image_size": image_size},
  )


def _pool(timm_pool: str, has_class: bool, has_map: bool) -> str:
  pools = {"map": has_map, "token": has_class, "": True, "avg": True}
  if timm_pool not in pools or not pools[timm_pool]:
    raise ValueError(f"timm_pool: {timm_pool!r} with these tensors; known: 'map', 'token', 'avg'")
  if timm_pool == "avg":
    raise ValueError("timm_pool: 'avg' moves the last norm behind the mean, which is not read")
  return "map" if has_map else "cls"


def _activation(kwargs: Any) -> str:
  """timm's ViTs have the exact gelu if nothing else is asked for."""
  names = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
  name = (kwargs or {}).get("act_layer", "gelu")
  if name not in names:
    raise ValueError(f"timm_model_kwargs: act_layer: {name!r}; known: {sorted(names)}")
  return names[name]


def _positions(p: str, class_position: bool) -> Row:
  ours: Any = f"{OURS}positions"
  if class_position:
    ours = (f"{OURS}class_position", ours)
  return Row(ours, f"{p}pos_embed", "1 n d -> 1 n d", resize="bicubic_antialias")


def _blocks(p: str, n: int, gated: bool, biases: str, scaled: bool) -> list[Row]:
  block, other = f"{OURS}encoder/block_{{}}/", f"{p}blocks.{{}}."
  qkv = tuple(f"{block}attn/{name}" for name in ("query", "key", "value"))
  fused = table.fused(qkv, f"{other}attn.qkv.weight", f"{other}attn.qkv.bias", n)
  first = tuple(f"{block}mlp/{name}" for name in ("gate", "fc1"))
  kernels, shifts = (tuple(f"{x}/{name}" for x in first) for name in ("kernel", "bias"))
  return [
    *table.norm(f"{block}ln1", f"{other}norm1", n),
    *(fused if "q" in biases else fused[:1]),
    Row(f"{block}attn/out/kernel", f"{other}attn.proj.weight", "d (h k) -> h k d", n),
    Row(f"{block}attn/out/bias", f"{other}attn.proj.bias", "", n),
    *(
      Row(f"{block}scale{i}", f"{other}ls{i}.gamma", "", n) for i in (1, 2) if scaled
    ),
    *table.norm(f"{block}ln2", f"{other}norm2", n),
    *(
      [
        Row(kernels, f"{other}mlp.fc1.weight", "(s o) i -> s i o", n),
        Row(shifts, f"{other}mlp.fc1.bias", "(s o) -> s o", n),
      ] if gated else table.dense(f"{block}mlp/fc1", f"{other}mlp.fc1", n)
    ),
    *table.dense(f"{block}mlp/fc2", f"{other}mlp.fc2", n),
  ]


def _map_head(p: str) -> list[Row]:
  head, other = f"{OURS}map_head", f"{p}attn_pool."
  return [
    Row(f"{head}/probe", f"{other}latent"),
    Row(f"{head}/attn/query/kernel", f"{other}q.weight", "(h k) d -> d h k"),
    Row(f"{head}/attn/query/bias", f"{other}q.bias", "(h k) -> h k"),
    *table.fused(
      (f"{head}/attn/key", f"{head}/attn/value"), f"{other}kv.weight", f"{other}kv.bias"
    ),
    Row(f"{head}/attn/out/kernel", f"{other}proj.weight", "d (h k) -> h k d"),
    Row(f"{head}/attn/out/bias", f"{other}proj.bias"),
    *table.norm(f"{head}/ln", f"{other}norm"),
    *table.dense(f"{head}/mlp/fc1", f"{other}mlp.fc1"),
    *table.dense(f"{head}/mlp/fc2", f"{other}mlp.fc2"),
  ]
