"""Layouts of open_clip's CLIP, CustomTextCLIP and CoCa, from their configs, JSON files."""

from __future__ import annotations

import importlib.util
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from bigalign import checks
from bigalign.weights import bert, table, timm
from bigalign.weights.clip import find_prefix
from bigalign.weights.files import read_json
from bigalign.weights.layout import Layout, Shapes, call, join, option, sizes
from bigalign.weights.table import Row

UNUSED = r"(^|\.)attn_mask$|position_ids$"


def open_clip(
  shapes: Shapes,
  where: str,
  prefix: str,
  *,
  embed_dim: int,
  vision_cfg: Any,
  text_cfg: Any,
  quick_gelu: bool = False,
  multimodal_cfg: Any = None,
  **_: Any,
) -> Layout:
  """The layout of a model_cfg. It does not name its class: the keys of the config decide.

  Args:
    shapes: what the file holds; empty for the sizes alone.
    where: the config's file, for errors.
    prefix: unused.
    embed_dim: width of the shared space.
    vision_cfg: config of the image tower.
    text_cfg: config of the text tower.
    quick_gelu: whether the towers use quick_gelu.
    multimodal_cfg: config of CoCa's decoder, whose layers are those of config.loss.coca.

  Raises:
    ValueError: for a model without a tower here.
  """
  act = "quick_gelu" if quick_gelu else "gelu"
  timm_tower = isinstance(vision_cfg, Mapping) and "timm_model_name" in vision_cfg
  # CustomTextCLIP has the text tower in a submodule.
  inside = find_prefix(shapes, "text.")
  hf = isinstance(text_cfg, Mapping) and "hf_model_name" in text_cfg
  text = _hugging_face if hf else _text
  scalars = [Row("t", "logit_scale")]
  if "logit_bias" in shapes:
    scalars.append(Row("b", "logit_bias"))
  of_images = (vision_cfg, f"{where}: vision_cfg", shapes, act)
  decoder = []
  if multimodal_cfg is not None:
    decoder = [call(_decoder, multimodal_cfg, f"{where}: multimodal_cfg", act)]
  return join(
    call(timm.trunk, *of_images) if timm_tower else call(_vision, *of_images, embed_dim),
    *decoder,
    call(text, text_cfg, f"{where}: text_cfg", shapes, inside, act),
    Layout({}, tuple(scalars)),
    embed_dim=embed_dim,
  )


def _blocks(ours: str, theirs: str, layers: int) -> list[Row]:
  """Rows of residual blocks with torch's MultiheadAttention."""
  block, other = f"{ours}encoder/block_{{}}/", f"{theirs}resblocks.{{}}."
  return [
    *table.norm(f"{block}ln1", f"{other}ln_1", layers),
    *_attention(f"{block}attn", f"{other}attn", layers),
    *table.norm(f"{block}ln2", f"{other}ln_2", layers),
    *table.dense(f"{block}mlp/fc1", f"{other}mlp.c_fc", layers),
    *table.dense(f"{block}mlp/fc2", f"{other}mlp.c_proj", layers),
  ]


def _attention(ours: str, theirs: str, layers: int = 0, *, fused: bool = True) -> list[Row]:
  """Rows of torch's MultiheadAttention; not fused if keys and values have another width."""
  names = ("query", "key", "value")
  qkv = tuple(f"{ours}/{name}" for name in names)
  rows = table.fused(qkv, f"{theirs}.in_proj_weight", f"{theirs}.in_proj_bias", layers)
  if not fused:
    kernels = [
      Row(f"{ours}/{x}/kernel", f"{theirs}.{x[0]}_proj_weight", "(h k) d -> d h k", layers)
      for x in names
    ]
    rows = [*kernels, rows[1]]
  return [
    *rows,
    Row(f"{ours}/out/kernel", f"{theirs}.out_proj.weight", "d (h k) -> h k d", layers),
    Row(f"{ours}/out/bias", f"{theirs}.out_proj.bias", "", layers),
  ]


def _decoder(
  act: str,
  *,
  layers: int = 12,
  context_length: Any = None,
  vocab_size: Any = None,
  width: Any = None,
  heads: Any = None,
  mlp_ratio: Any = None,
  dim_head: Any = None,
  latent_dim: Any = None,
  **_: Any,
) -> Layout:
  """The layout of CoCa's decoder, which does not use the other sizes of its config."""
  block, own = "heads/coca/decoder/block_{}/", "text_decoder.resblocks.{}."
  cross = "text_decoder.cross_attn.{}."
  norms = {"ln1": "ln_1", "ln_attn_mlp": "ln_2"}
  cross_norms = {"ln_cross": "ln_1", "ln_memory": "ln_1_kv", "ln2": "ln_2"}
  mlps = {"attn_mlp": own, "mlp": cross}
  return Layout(
    {},
    (
      *(row for x, y in norms.items() for row in table.norm(f"{block}{x}", f"{own}{y}", layers)),
      *(
        row
        for x, y in cross_norms.items()
        for row in table.norm(f"{block}{x}", f"{cross}{y}", layers)
      ),
      *_attention(f"{block}attn", f"{own}attn", layers),
      *_attention(f"{block}cross_attn", f"{cross}attn", layers),
      *(
        row
        for x, theirs in mlps.items()
        for layer, name in (("fc1", "c_fc"), ("fc2", "c_proj"))
        for row in table.dense(f"{block}{x}/{layer}", f"{theirs}mlp.{name}", layers)
      ),
      *table.norm("heads/coca/decoder/ln", "text_decoder.ln_final"),
      Row("heads/coca/logits/kernel", "text_decoder.text_projection"),
    ),
    UNUSED,
  )


def _scales(ours: str, theirs: str, layers: int, value: float | None) -> list[Row]:
  """Rows of LayerScale, if the config has an initial value of it."""
  if value is None:
    return []
  block, other = f"{ours}encoder/block_{{}}/scale", f"{theirs}resblocks.{{}}.ls_"
  return [Row(f"{block}{i}", f"{other}{i}.gamma", layers=layers) for i in (1, 2)]


def _epsilon(default: float, kwargs: Any) -> float:
  """The epsilon of the norms."""
  epsilon = option(kwargs, "norm_kwargs", "eps", default)
  if not isinstance(epsilon, float) or not 0 < epsilon < 1:
    raise ValueError(f"norm_kwargs: eps: {str(epsilon)[:80]}")
  return float(epsilon)


def _activation(act: str, kwargs: Any) -> str:
  """The activation, which act_kwargs can change to the tanh gelu."""
  if not kwargs:
    return act
  if act != "gelu" or kwargs != {"approximate": "tanh"}:
    raise ValueError(f"act_kwargs: {kwargs}; known: {{'approximate': 'tanh'}}, without quick_gelu")
  return "gelu_tanh"


def _refuse(options: Mapping[str, Any], known: Mapping[str, Any]) -> None:
  """Raises ValueError for an option with another value than `known`: our towers lack it."""
  for name, value in options.items():
    if value != known[name]:
      raise ValueError(f"{name}: {value!r} is not supported; only {known[name]!r}")


def _vision(
  shapes: Shapes,
  act: str,
  embed_dim: int,
  *,
  layers: Any = 12,
  width: int = 768,
  head_width: int = 64,
  mlp_ratio: float = 4.0,
  patch_size: int | None = 16,
  image_size: Any = 224,
  ls_init_value: float | None = None,
  no_ln_pre: bool = False,
  pool_type: str = "tok",
  norm_kwargs: Any = None,
  act_kwargs: Any = None,
  pos_embed_type: str = "learnable",
  final_ln_after_pool: bool = False,
  attentional_pool: Any = False,
  attn_pooler_queries: int = 256,
  attn_pooler_heads: int = 8,
  **_: Any,
) -> Layout:
  """The layout of open_clip's own ViT."""
  if type(layers) is not int:
    raise ValueError(f"layers: {str(layers)[:80]}; a ResNet is not supported, only a ViT")
  _refuse(
    dict(
      pool_type=pool_type,
      pos_embed_type=pos_embed_type,
      attentional_pool=attentional_pool,
      final_ln_after_pool=final_ln_after_pool,
    ),
    dict(
      pool_type="tok",
      pos_embed_type="learnable",
      attentional_pool=attentional_pool is True,
      final_ln_after_pool=False,
    ),
  )
  ours, theirs = "image_tower/", "visual."
  options = dict(
    name="vit",
    patch=patch_size,
    patch_bias=False,
    pool="cls",
    class_position=True,
    pre_norm=not no_ln_pre,
    activation=_activation(act, act_kwargs),
    epsilon=_epsilon(1e-5, norm_kwargs),
    layer_scale=ls_init_value,
    **sizes(width, layers, width // max(head_width, 1), int(width * mlp_ratio)),
  )
  last = table.norm(f"{ours}encoder/ln", f"{theirs}ln_post")
  if attentional_pool:
    own, pool = f"{ours}pooler/", f"{theirs}attn_pool."
    options |= dict(
      pool="queries",
      class_token=True,
      queries=attn_pooler_queries,
      query_heads=attn_pooler_heads,
      query_width=embed_dim,
    )
    last = [
      Row(f"{own}queries", f"{pool}query", "n d -> 1 n d"),
      *table.norm(f"{own}ln_queries", f"{pool}ln_q"),
      *table.norm(f"{own}ln_tokens", f"{pool}ln_k"),
      *_attention(f"{own}attn", f"{pool}attn", fused=width == embed_dim),
      *table.norm(f"{own}ln", f"{theirs}ln_post"),
    ]
  rows = (
    Row(f"{ours}extra_tokens", f"{theirs}class_embedding", "d -> 1 1 d"),
    *table.conv(f"{ours}embedding", f"{theirs}conv1", bias=False),
    Row(
      (f"{ours}class_position", f"{ours}positions"),
      f"{theirs}positional_embedding",
      "n d -> 1 n d",
      resize="bicubic_antialias",
    ),
    *([] if no_ln_pre else table.norm(f"{ours}ln_pre", f"{theirs}ln_pre")),
    *_blocks(ours, f"{theirs}transformer.", layers),
    *_scales(ours, f"{theirs}transformer.", layers, ls_init_value),
    *last,
    Row("image_projector/out/kernel", f"{theirs}proj"),
  )
  return Layout(
    {"image": options, "image_projector": dict(name="linear"), "pixels": "clip"},
    rows,
    UNUSED,
    data={"image_size": image_size},
  )


def _text(
  shapes: Shapes,
  inside: str,
  act: str,
  *,
  context_length: int = 77,
  vocab_size: int = 49408,
  width: int = 512,
  heads: int = 8,
  layers: int = 12,
  mlp_ratio: float = 4.0,
  ls_init_value: float | None = None,
  no_causal_mask: bool = False,
  proj_bias: bool = False,
  proj_type: str = "linear",
  pool_type: str = "argmax",
  eos_id: int = 2,
  norm_kwargs: Any = None,
  act_kwargs: Any = None,
  embed_cls: bool = False,
  correct_cls_mask: bool = False,
  final_ln_after_pool: bool = False,
  **_: Any,
) -> Layout:
  """The layout of open_clip's own text transformer."""
  _refuse(
    dict(final_ln_after_pool=final_ln_after_pool, ls_init_value=ls_init_value),
    dict(final_ln_after_pool=False, ls_init_value=None),
  )
  pools: dict[str, dict[str, Any]] = {
    "argmax": dict(pool="argmax"),
    "last": dict(pool="last"),
    "eos": dict(pool="eos", eos=eos_id),
  }
  if pool_type not in pools:
    raise ValueError(f"pool_type: {pool_type!r}; known: {sorted(pools)}")
  ours = "text_tower/"
  options = dict(
    name="text",
    vocab_size=vocab_size,
    length=context_length,
    causal=not no_causal_mask,
    mask_padding=False,
    activation=_activation(act, act_kwargs),
    epsilon=_epsilon(1e-5, norm_kwargs),
    **pools[pool_type],
    **sizes(width, layers, heads, int(width * mlp_ratio)),
  )
  last = table.norm(f"{ours}encoder/ln", f"{inside}ln_final")
  if embed_cls:
    options |= dict(pool="class", mask_padding=True, shifted_mask=not correct_cls_mask)
    options.pop("eos", None)
    last = [
      Row(f"{ours}class_token", f"{inside}cls_emb", "d -> 1 1 d"),
      *table.norm(f"{ours}ln", f"{inside}ln_final"),
    ]
  projector, projection = timm.projector(
    "text",
    {
      "linear": {"out": (f"{inside}text_projection", proj_bias)},
      "none": {},
    },
    proj_type,
    "proj_type",
    shapes,
  )
  if projection and not proj_bias:  # a bare matrix [in, out], not an nn.Linear
    projection = (Row("text_projector/out/kernel", f"{inside}text_projection"),)
  rows = (
    Row(f"{ours}embedding", f"{inside}token_embedding.weight"),
    Row(f"{ours}positions", f"{inside}positional_embedding", "n d -> 1 n d"),
    *_blocks(ours, f"{inside}transformer.", layers),
    *last,
    *projection,
  )
  return Layout(
    {"text": options, "text_projector": projector}, rows, UNUSED, data={"length": context_length}
  )


# Sizes of Hugging Face's models, for configs without weights:
# {name: (vocabulary, width, layers, hidden, positions, token types)}
_SIZES = {
  "bert-base-uncased": (30522, 768, 12, 3072, 512, 2),
  "bert-large-uncased": (30522, 1024, 24, 4096, 512, 2),
  "roberta-base": (50265, 768, 12, 3072, 514, 1),
  "roberta-large": (50265, 1024, 24, 4096, 514, 1),
  "xlm-roberta-base": (250002, 768, 12, 3072, 514, 1),
  "xlm-roberta-large": (250002, 1024, 24, 4096, 514, 1),
}
# Hugging Face towers: (regular expression of the name, layout, epsilon of the norms)
_FAMILIES: tuple[tuple[str, Any, float], ...] = (
  (r"mpnet", bert.mpnet, 1e-5),
  (r"roberta", bert.roberta, 1e-5),
  (r"bert|MiniLM", bert.bert, 1e-12),
)
_POOLERS = {"mean_pooler": "mean", "cls_pooler": "pooler", "cls_last_hidden_state_pooler": "cls"}


def _hugging_face(
  shapes: Shapes,
  inside: str,
  act: str,
  *,
  hf_model_name: str,
  hf_pooler_type: str = "mean_pooler",
  hf_proj_type: str | None = "mlp",
  context_length: int = 77,
  heads: int | None = None,
  vocab_size: Any = None,
  width: Any = None,
  layers: Any = None,
  mlp_ratio: Any = None,
  **_: Any,
) -> Layout:
  """The layout of a Hugging Face text tower, whose sizes are read from its tensors.

  open_clip has no use for the sizes of its own tower next to a hf_model_name.
  """
  family = next((x for x in _FAMILIES if re.search(x[0], hf_model_name)), None)
  if family is None or hf_pooler_type not in _POOLERS:
    raise ValueError(
      f"hf_model_name, hf_pooler_type: {hf_model_name!r}, {hf_pooler_type!r}; supported are names"
      f" with {[x[0] for x in _FAMILIES]} and the poolers {sorted(_POOLERS)}"
    )
  layout, epsilon = family[1:]
  prefix = f"{inside}transformer."
  vocab, width, depth, hidden, rows, types = _sizes(shapes, prefix, hf_model_name)
  config = dict(
    vocab_size=vocab,
    hidden_size=width,
    intermediate_size=hidden,
    max_position_embeddings=rows,
    num_hidden_layers=depth,
    num_attention_heads=timm.count_heads(width, heads, hf_model_name),
    layer_norm_eps=epsilon,
    type_vocab_size=types,
  )
  part = call(layout, config, f"hf_model_name={hf_model_name!r}", shapes, "", prefix)
  text = {**part.model["text"], "pool": _POOLERS[hf_pooler_type]}
  projector, projection = timm.projector(
    "text",
    {
      "linear": {"out": (f"{inside}proj", False)},
      "mlp": {"fc1": (f"{inside}proj.0", False), "fc2": (f"{inside}proj.2", False)},
      None: {},
    },
    hf_proj_type,
    "hf_proj_type",
    shapes,
  )
  return join(part, Layout({"text": text, "text_projector": projector}, projection, UNUSED))


def _sizes(shapes: Shapes, prefix: str, name: str) -> tuple[int, ...]:
  """The sizes of the tensors, or without any those of the name; order as in _SIZES."""
  if not shapes:
    return tuple(checks.choose(_SIZES, name, "hf_model_name, without weights"))
  tables = f"{prefix}embeddings."
  vocab, width = timm.dims(shapes, f"{tables}word_embeddings.weight", 2)
  types = f"{tables}token_type_embeddings.weight"
  return (
    vocab,
    width,
    timm.depth(shapes, f"{prefix}encoder.layer."),
    timm.dims(shapes, f"{prefix}encoder.layer.0.intermediate.dense.weight", 2)[0],
    timm.dims(shapes, f"{tables}position_embeddings.weight", 2)[0],
    timm.dims(shapes, types, 2)[0] if types in shapes else 0,
  )


def model(name: str) -> Mapping[str, Any]:
  """config.model of one of open_clip's models.

  Args:
    name: a model of the installed open_clip_torch, such as "ViT-B-16", whose files are read
      without importing it; or a JSON file of the same form.

  Raises:
    FileNotFoundError: for an unknown name.
    ValueError: for a model that our towers do not support, with the option.
  """
  file = pathlib.Path(name)
  if file.suffix != ".json":
    spec = importlib.util.find_spec("open_clip")
    folder = pathlib.Path(spec.origin).parent if spec and spec.origin else pathlib.Path()
    file = folder / f"model_configs/{name.replace('/', '-')}.json"
    if not file.is_file():
      raise FileNotFoundError(
        f"{name!r} is neither a JSON file nor a model of an installed open_clip_torch ({file})"
      )
  return call(open_clip, read_json(file), str(file), {}, str(file), "").model
