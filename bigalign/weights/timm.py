"""Layouts of timm's vision transformers, the trunks of open_clip's models.

Their configs are code in timm. Here sizes are read from the tensors; the other options, and all of
them if there are no tensors, follow from the model's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from bigalign.weights import table
from bigalign.weights.layout import Layout, Shapes, option, sizes
from bigalign.weights.table import Row

OURS, THEIRS = "image_tower/", "visual.trunk."
# {size: (width, depth, heads, hidden units per width)}
_SIZES = {
  "small": (384, 12, 6, 4.0),
  "medium": (512, 12, 8, 4.0),
  "base": (768, 12, 12, 4.0),
  "large": (1024, 24, 16, 4.0),
  "so400m": (1152, 27, 16, 3.7362),
  "huge": (1280, 32, 16, 4.0),
  "giantopt": (1536, 40, 16, 4.0),
  "giant": (1408, 40, 16, 48 / 11),
  "gigantic": (1664, 48, 16, 64 / 13),
}
_NAME = re.compile(
  r"vit_([a-z0-9]+)_patch(\d+)_(?:reg(\d+)_)?(siglip|clip|dinov2)(_quickgelu)?(_\d+)?"
)
_TANH = r"giantopt_|so400m_patch16_siglip_\d|base_patch32_siglip_\d|large_patch16_siglip_512"
# Activations that are not the exact gelu.
_ACTIVATIONS = {r"_quickgelu": "quick_gelu", _TANH: "gelu_tanh"}
# Number of heads of models whose heads are not 64 wide, timm's and Hugging Face's.
_HEADS = {r"so400m|giantopt|huge|gigantic|giant_patch14_clip": 16, r"MiniLM": 12}


class Trunk(NamedTuple):
  """The architecture of a trunk.

  Args:
    width: width of the tokens.
    depth: number of blocks.
    heads: attention heads.
    hidden: hidden units of the MLP.
    patch: pixels per side of a patch.
    class_token: whether it has a class token.
    registers: number of registers.
    map_pool: whether it has attention pooling.
    pre_norm: whether a layer norm precedes the blocks.
    scaled: whether it has LayerScale.
    gated: whether the MLP is gated.
    biases: which of q, k, v and o(utput) have a bias.
    patch_bias: whether the patch embedding has a bias.
  """

  width: int
  depth: int
  heads: int
  hidden: int
  patch: int
  class_token: bool
  registers: int
  map_pool: bool
  pre_norm: bool
  scaled: bool
  gated: bool
  biases: str
  patch_bias: bool


def measured(shapes: Shapes, name: str, heads: int | None) -> Trunk:
  """A trunk from the shapes of its tensors, and its number of heads, which no tensor shows."""
  p = THEIRS
  width, patch = dims(shapes, f"{p}patch_embed.proj.weight", 4)[::2]
  hidden = dims(shapes, f"{p}blocks.0.mlp.fc1.weight", 2)[0]
  gated = hidden == 2 * dims(shapes, f"{p}blocks.0.mlp.fc2.weight", 2)[1]
  return Trunk(
    width,
    depth(shapes, f"{p}blocks."),
    count_heads(width, heads, name),
    hidden // (1 + gated),
    patch,
    f"{p}cls_token" in shapes,
    dims(shapes, f"{p}reg_token", 3)[1] if f"{p}reg_token" in shapes else 0,
    f"{p}attn_pool.latent" in shapes,
    f"{p}norm_pre.weight" in shapes,
    f"{p}blocks.0.ls1.gamma" in shapes,
    gated,
    "qkvo" if f"{p}blocks.0.attn.qkv.bias" in shapes else "o",
    f"{p}patch_embed.proj.bias" in shapes,
  )


def named(name: str) -> Trunk:
  """A trunk of SigLIP, CLIP or DINOv2 from its name in timm.

  Raises:
    ValueError: for another name.
  """
  match = _NAME.fullmatch(name)
  if not match or match[1] not in _SIZES:
    raise ValueError(
      f"timm_model_name: {name!r}; known without weights: vit_SIZE_patchN_KIND with the sizes"
      f" {sorted(_SIZES)} and the kinds siglip, clip, dinov2, regN_dinov2"
    )
  width, count, heads, ratio = _SIZES[match[1]]
  hidden, kind = int(width * ratio), match[4]
  gated = kind == "dinov2" and match[1] == "giant"
  if gated:
    width, count, heads, hidden = 1536, 40, 24, 4096
  return Trunk(
    width,
    count,
    heads,
    hidden,
    int(match[2]),
    kind != "siglip",
    int(match[3] or 0),
    kind == "siglip",
    kind == "clip",
    kind == "dinov2",
    gated,
    "qkvo",
    kind != "clip",
  )


def dims(shapes: Shapes, key: str, count: int) -> tuple[int, ...]:
  """The shape of a tensor, which must have `count` axes.

  Raises:
    ValueError: if it is missing or has another number of axes.
  """
  if key not in shapes:
    raise ValueError(f"{key}: is missing")
  shape = tuple(shapes[key].shape)
  if len(shape) != count or not all(shape):
    raise ValueError(f"{key}: {list(shape)} must have {count} axes")
  return shape


def depth(shapes: Shapes, start: str, end: str = ".") -> int:
  """The number of layers, from keys that begin with "start0.", "start1." …"""
  matches = (re.match(rf"{re.escape(start)}(\d{{1,6}}){re.escape(end)}", key) for key in shapes)
  return max((int(x[1]) + 1 for x in matches if x), default=0)


def count_heads(width: int, given: int | None, name: str = "") -> int:
  """The number of heads: the given one, that of a known model, or one head per 64 channels.

  Raises:
    ValueError: if none of these is possible.
  """
  known = next((n for pattern, n in _HEADS.items() if re.search(pattern, name)), None)
  count = given or known or width // 64
  if not count or width % count or (not given and not known and width % 64):
    raise ValueError(
      f"heads: the checkpoint does not give the number for a width of {width}; set heads="
    )
  return count


def projector(
  side: str,
  kinds: Mapping[Any, Mapping[str, tuple[str, bool]]],
  kind: Any,
  option: str,
  shapes: Shapes,
) -> tuple[dict[str, Any], tuple[Row, ...]]:
  """The options and rows of a projector.

  Args:
    side: "image" or "text".
    kinds: {kind: {our layer: (their name, whether it has a bias)}}.
    kind: the kind in their config.
    option: the name of the kind in their config, for errors.
    shapes: what the file holds.

  Raises:
    ValueError: for an unknown kind.
  """
  if kind not in kinds:
    raise ValueError(f"{option}: {kind!r}; known: {list(kinds)}")
  layers = kinds[kind]
  rows = tuple(
    row
    for name, (theirs, bias) in layers.items()
    for row in table.dense(f"{side}_projector/{name}", theirs, bias=bias)
  )
  if not layers:
    return dict(name="identity"), ()
  if "out" in layers:
    return dict(name="linear", bias=layers["out"][1]), rows
  first, last = layers["fc1"][1], layers["fc2"][1]
  if not shapes and side == "image":
    raise ValueError(
      f"{option}: {kind!r} needs the weights: its hidden units are not in the config"
    )
  # The hidden layer of a text projector has the mean width of both sides, our default.
  hidden = dims(shapes, f"{layers['fc1'][0]}.weight", 2)[0] if shapes else None
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
  layers: Any = None,
  width: Any = None,
  patch_size: Any = None,
  head_width: Any = None,
  mlp_ratio: Any = None,
  **_: Any,
) -> Layout:
  """The layout of a vision_cfg with a timm model, which has no use for the sizes of other towers.

  Raises:
    ValueError: for a model without a tower here.
  """
  p = THEIRS
  has_trunk = any(key.startswith(p) for key in shapes)
  x = measured(shapes, timm_model_name, heads) if has_trunk else named(timm_model_name)
  options: dict[str, Any] = dict(
    name="vit",
    patch=x.patch,
    patch_bias=x.patch_bias,
    pool=_pool(timm_pool, x.class_token, x.map_pool),
    class_token=x.class_token,
    class_position=x.class_token and not x.registers,
    registers=x.registers,
    biases=x.biases,
    gated=x.gated,
    activation="silu" if x.gated else _activation(timm_model_name, timm_model_kwargs),
    layer_scale=1e-5 if x.scaled else None,
    pre_norm=x.pre_norm,
    epsilon=1e-5 if x.pre_norm else 1e-6,
    **sizes(x.width, x.depth, x.heads, x.hidden),
  )
  rows = [
    *table.conv(f"{OURS}embedding", f"{p}patch_embed.proj", bias=x.patch_bias),
    _positions(p, options["class_position"]),
    *(table.norm(f"{OURS}ln_pre", f"{p}norm_pre") if x.pre_norm else ()),
    *_blocks(p, x),
    *table.norm(f"{OURS}encoder/ln", f"{p}norm"),
    *(_map_head(p) if x.map_pool else ()),
  ]
  if x.class_token:
    keys = (f"{p}cls_token", f"{p}reg_token")
    rows.append(
      Row(f"{OURS}extra_tokens", keys, "1 n d -> 1 n d")
      if x.registers
      else Row(f"{OURS}extra_tokens", keys[0])
    )
  # If open_clip adds no projection, timm's own classifier is the projection.
  own = {"out": (f"{p}head", True)}
  projected, projection = projector(
    "image",
    {
      "none": {},
      "": own,
      None: own,
      "linear": {"out": ("visual.head.proj", timm_proj_bias)},
      "mlp": {"fc1": ("visual.head.mlp.fc1", True), "fc2": ("visual.head.mlp.fc2", timm_proj_bias)},
    },
    timm_proj,
    "timm_proj",
    shapes,
  )
  return Layout(
    {"image": options, "image_projector": projected, "pixels": "half" if x.map_pool else "clip"},
    (*rows, *projection),
    data={"image_size": image_size},
  )


def _pool(timm_pool: str, has_class: bool, has_map: bool) -> str:
  """Our name of the pooling, which must agree with the tensors."""
  pools = {"map": has_map, "token": has_class, "": True, "avg": True}
  if timm_pool not in pools or not pools[timm_pool]:
    raise ValueError(f"timm_pool: {timm_pool!r} with these tensors; known: 'map', 'token', 'avg'")
  if timm_pool == "avg":
    raise ValueError("timm_pool: 'avg' puts the last norm after the mean, which is not supported")
  return "map" if has_map else "cls"


def _activation(model: str, kwargs: Any) -> str:
  """The activation of the config, else timm's for a model of this name."""
  default = next((x for pattern, x in _ACTIVATIONS.items() if re.search(pattern, model)), "gelu")
  name = option(kwargs, "timm_model_kwargs", "act_layer", default)
  if name not in ("gelu", "gelu_tanh", "quick_gelu"):
    raise ValueError(f"timm_model_kwargs: act_layer: {name!r}; known: gelu, gelu_tanh, quick_gelu")
  return str(name)


def _positions(p: str, class_position: bool) -> Row:
  """Positions of the patches, and of the class token if it has one."""
  ours: Any = f"{OURS}positions"
  if class_position:
    ours = (f"{OURS}class_position", ours)
  return Row(ours, f"{p}pos_embed", "1 n d -> 1 n d", resize="bicubic_antialias")


def _blocks(p: str, x: Trunk) -> list[Row]:
  """Rows of the blocks."""
  n, block, other = x.depth, f"{OURS}encoder/block_{{}}/", f"{p}blocks.{{}}."
  qkv = tuple(f"{block}attn/{name}" for name in ("query", "key", "value"))
  fused = table.fused(qkv, f"{other}attn.qkv.weight", f"{other}attn.qkv.bias", n)
  first = tuple(f"{block}mlp/{name}" for name in ("gate", "fc1"))
  kernels, shifts = (tuple(f"{path}/{name}" for path in first) for name in ("kernel", "bias"))
  return [
    *table.norm(f"{block}ln1", f"{other}norm1", n),
    *(fused if "q" in x.biases else fused[:1]),
    Row(f"{block}attn/out/kernel", f"{other}attn.proj.weight", "d (h k) -> h k d", n),
    Row(f"{block}attn/out/bias", f"{other}attn.proj.bias", "", n),
    *(Row(f"{block}scale{i}", f"{other}ls{i}.gamma", "", n) for i in (1, 2) if x.scaled),
    *table.norm(f"{block}ln2", f"{other}norm2", n),
    *(
      [
        Row(kernels, f"{other}mlp.fc1.weight", "(s o) i -> s i o", n),
        Row(shifts, f"{other}mlp.fc1.bias", "(s o) -> s o", n),
      ]
      if x.gated
      else table.dense(f"{block}mlp/fc1", f"{other}mlp.fc1", n)
    ),
    *table.dense(f"{block}mlp/fc2", f"{other}mlp.fc2", n),
  ]


def _map_head(p: str) -> list[Row]:
  """Rows of the attention pooling."""
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
