"""Makes towers/: small checkpoints of random numbers with inputs and the outputs to expect.

After a change of tower_formulas.py, run: python tests/expected/make_towers.py

A folder holds a checkpoint as its library writes it (config.json and model.safetensors, or
open_clip_config.json and open_clip_model.safetensors, or weights.npz), io.npz with inputs and
outputs (`out_*`), and meta.json. index.json has the numbers of heads, which open_clip's files do
not say for towers of timm and Hugging Face.
"""

from __future__ import annotations

import json
import pathlib
import zlib

import numpy as np
from safetensors.numpy import save_file
from tower_formulas import LAYOUTS, outputs

FOLDER = pathlib.Path(__file__).parent / "towers"
# Widths differ between all parts, so that no two of them can be confused.
WIDTH, HEADS, MLP, PATCH, GRID = 16, 2, 24, 4, 4
TEXT_WIDTH, TEXT_HEADS, TEXT_MLP, LENGTH, VOCABULARY = 12, 3, 20, 12, 40
DEPTH, EMBED = 2, 10
SIZE = PATCH * GRID
REGISTERS = 3
# Tokens before the first norm have a small variance, so that its epsilon shows in the outputs.
FAINT = 0.03


class Draw:
  """Random tensors by name. The seed comes from the name of the case."""

  def __init__(self, case):
    self.rng = np.random.default_rng(zlib.crc32(case.encode()))
    self.tensors = {}

  def normal(self, name, *shape, scale=1.0, mean=0.0):
    x = mean + scale * self.rng.standard_normal(shape)
    self.tensors[name] = np.asarray(x, np.float32)

  def linear(self, name, out, of, bias=True, separator="."):
    self.normal(f"{name}{separator}weight", out, of, scale=1.2 / of**0.5)
    if bias:
      self.normal(f"{name}{separator}bias", out, scale=0.2)

  def norm(self, name, width):
    self.normal(f"{name}.weight", width, scale=0.2, mean=1.0)
    self.normal(f"{name}.bias", width, scale=0.2)

  def convolution(self, name, width, bias=True):
    self.normal(f"{name}.weight", width, 3, PATCH, PATCH, scale=FAINT / (3 * PATCH**2) ** 0.5)
    if bias:
      self.normal(f"{name}.bias", width, scale=FAINT)

  def blocks(self, prefix, layout, width, mlp, *, key_bias=True, gated=False, scaled=False):
    names = LAYOUTS[layout]
    for i in range(DEPTH):
      block = prefix + names["block"].format(i)
      self.norm(block + names["norm1"], width)
      self.norm(block + names["norm2"], width)
      if "qkv" in names:
        name, separator = names["qkv"][:-1], names["qkv"][-1]
        self.linear(block + name, 3 * width, width, separator=separator)
      else:
        for part in ("q", "k", "v"):
          self.linear(block + names[part], width, width, bias=key_bias or part != "k")
      self.linear(block + names["out"], width, width)
      if gated:
        self.linear(block + names["gated_in"], 2 * mlp, width)
        self.linear(block + names["gated_out"], width, mlp)
      else:
        self.linear(block + names["fc1"], mlp, width)
        self.linear(block + names["fc2"], width, mlp)
      if scaled:
        for part in ("scale1", "scale2"):
          self.normal(block + names[part], width, scale=0.2, mean=0.7)

  def mlp(self, prefix, width, mlp):
    self.linear(f"{prefix}fc1", mlp, width)
    self.linear(f"{prefix}fc2", width, mlp)

  def scale(self, *shape, bias=False):
    self.normal("logit_scale", *shape, scale=0.1, mean=2.3)
    if bias:
      self.normal("logit_bias", *shape, scale=0.1, mean=-3.0)


# --- tensors of the families --------------------------------------------------------------------


def siglip(draw, patches_are_flat=False):
  v, t = "vision_model.", "text_model."
  if patches_are_flat:
    name, numbers = f"{v}embeddings.patch_embedding", 3 * PATCH**2
    draw.normal(f"{name}.weight", WIDTH, numbers, scale=FAINT / numbers**0.5)
    draw.normal(f"{name}.bias", WIDTH, scale=FAINT)
  else:
    draw.convolution(f"{v}embeddings.patch_embedding", WIDTH)
  draw.normal(f"{v}embeddings.position_embedding.weight", GRID**2, WIDTH, scale=FAINT)
  draw.blocks(v, "hf", WIDTH, MLP)
  draw.norm(f"{v}post_layernorm", WIDTH)
  draw.normal(f"{v}head.probe", 1, 1, WIDTH)
  draw.linear(f"{v}head.attention.in_proj", 3 * WIDTH, WIDTH, separator="_")
  draw.linear(f"{v}head.attention.out_proj", WIDTH, WIDTH)
  draw.norm(f"{v}head.layernorm", WIDTH)
  draw.mlp(f"{v}head.mlp.", WIDTH, MLP)
  hf_text(draw)
  draw.linear(f"{t}head", WIDTH, TEXT_WIDTH)
  draw.scale(1, bias=True)


def hf_text(draw):
  t = "text_model."
  draw.normal(f"{t}embeddings.token_embedding.weight", VOCABULARY, TEXT_WIDTH, scale=FAINT)
  draw.normal(f"{t}embeddings.position_embedding.weight", LENGTH, TEXT_WIDTH, scale=FAINT)
  draw.blocks(t, "hf", TEXT_WIDTH, TEXT_MLP)
  draw.norm(f"{t}final_layer_norm", TEXT_WIDTH)


def clip(draw):
  v = "vision_model."
  draw.convolution(f"{v}embeddings.patch_embedding", WIDTH, bias=False)
  draw.normal(f"{v}embeddings.class_embedding", WIDTH, scale=FAINT)
  draw.normal(f"{v}embeddings.position_embedding.weight", GRID**2 + 1, WIDTH, scale=FAINT)
  draw.norm(f"{v}pre_layrnorm", WIDTH)
  draw.blocks(v, "hf", WIDTH, MLP)
  draw.norm(f"{v}post_layernorm", WIDTH)
  hf_text(draw)
  draw.linear("visual_projection", EMBED, WIDTH, bias=False)
  draw.linear("text_projection", EMBED, TEXT_WIDTH, bias=False)
  draw.scale()


def vit(draw, prefix=""):
  embeddings = f"{prefix}embeddings."
  draw.normal(f"{embeddings}cls_token", 1, 1, WIDTH, scale=FAINT)
  draw.normal(f"{embeddings}position_embeddings", 1, GRID**2 + 1, WIDTH, scale=FAINT)
  draw.convolution(f"{embeddings}patch_embeddings.projection", WIDTH)
  draw.blocks(prefix, "vit", WIDTH, MLP)
  draw.norm(f"{prefix}layernorm", WIDTH)
  draw.linear(f"{prefix}pooler.dense", WIDTH, WIDTH)


def dinov2(draw, prefix="", registers=0, gated=False):
  embeddings = f"{prefix}embeddings."
  draw.normal(f"{embeddings}cls_token", 1, 1, WIDTH, scale=FAINT)
  draw.normal(f"{embeddings}mask_token", 1, WIDTH)
  draw.normal(f"{embeddings}position_embeddings", 1, GRID**2 + 1, WIDTH, scale=FAINT)
  if registers:
    draw.normal(f"{embeddings}register_tokens", 1, registers, WIDTH, scale=FAINT)
  draw.convolution(f"{embeddings}patch_embeddings.projection", WIDTH)
  hidden = gated_width() if gated else DINO_RATIO * WIDTH
  draw.blocks(prefix, "dinov2", WIDTH, hidden, gated=gated, scaled=True)
  draw.norm(f"{prefix}layernorm", WIDTH)


DINO_RATIO = 2


def gated_width():
  return (int(DINO_RATIO * WIDTH * 2 / 3) + 7) // 8 * 8


def dinov3(draw):
  draw.normal("embeddings.cls_token", 1, 1, WIDTH, scale=FAINT)
  draw.normal("embeddings.mask_token", 1, 1, WIDTH)
  draw.normal("embeddings.register_tokens", 1, REGISTERS, WIDTH, scale=FAINT)
  draw.convolution("embeddings.patch_embeddings", WIDTH)
  draw.blocks("", "dinov3", WIDTH, MLP, key_bias=False, scaled=True)
  draw.norm("norm", WIDTH)


def bert(draw, prefix="", kind="bert", pooler=True):
  e, rows = f"{prefix}embeddings.", LENGTH + (2 if kind != "bert" else 0)
  draw.normal(f"{e}word_embeddings.weight", VOCABULARY, TEXT_WIDTH, scale=FAINT)
  draw.normal(f"{e}position_embeddings.weight", rows, TEXT_WIDTH, scale=FAINT)
  if kind != "mpnet":
    types = 2 if kind == "bert" else 1
    draw.normal(f"{e}token_type_embeddings.weight", types, TEXT_WIDTH, scale=FAINT)
  else:
    draw.normal(f"{prefix}encoder.relative_attention_bias.weight", 32, TEXT_HEADS)
  draw.norm(f"{e}LayerNorm", TEXT_WIDTH)
  draw.blocks(prefix, "mpnet" if kind == "mpnet" else "bert", TEXT_WIDTH, TEXT_MLP)
  if pooler:
    draw.linear(f"{prefix}pooler.dense", TEXT_WIDTH, TEXT_WIDTH)


def dual(draw, image, kind):
  image(draw, "vision_model.")
  bert(draw, "text_model.", kind)
  draw.linear("visual_projection", EMBED, WIDTH, bias=False)
  draw.linear("text_projection", EMBED, TEXT_WIDTH, bias=False)
  draw.scale()


def open_clip_image(draw):
  v = "visual."
  draw.convolution(f"{v}conv1", WIDTH, bias=False)
  draw.normal(f"{v}class_embedding", WIDTH, scale=FAINT)
  draw.normal(f"{v}positional_embedding", GRID**2 + 1, WIDTH, scale=FAINT)
  draw.norm(f"{v}ln_pre", WIDTH)
  draw.blocks(v, "open_clip", WIDTH, 2 * WIDTH)
  draw.norm(f"{v}ln_post", WIDTH)
  draw.normal(f"{v}proj", WIDTH, EMBED, scale=WIDTH**-0.5)


def open_clip_text(draw, prefix, width):
  draw.normal(f"{prefix}token_embedding.weight", VOCABULARY, width, scale=FAINT)
  draw.normal(f"{prefix}positional_embedding", LENGTH, width, scale=FAINT)
  draw.blocks(prefix, "open_clip", width, 2 * width)
  draw.norm(f"{prefix}ln_final", width)


def open_clip_vit(draw):
  open_clip_image(draw)
  open_clip_text(draw, "", TEXT_WIDTH)
  draw.normal("text_projection", TEXT_WIDTH, EMBED, scale=TEXT_WIDTH**-0.5)
  draw.scale()


def timm_trunk(draw, *, token, scaled):
  v = "visual.trunk."
  draw.convolution(f"{v}patch_embed.proj", WIDTH)
  draw.normal(f"{v}pos_embed", 1, GRID**2, WIDTH, scale=FAINT)
  if token:
    draw.normal(f"{v}cls_token", 1, 1, WIDTH, scale=FAINT)
    draw.normal(f"{v}reg_token", 1, REGISTERS, WIDTH, scale=FAINT)
  draw.blocks(v, "timm", WIDTH, 2 * WIDTH, scaled=scaled)
  draw.norm(f"{v}norm", WIDTH)


def open_clip_siglip(draw):
  timm_trunk(draw, token=False, scaled=False)
  head = "visual.trunk.attn_pool."
  draw.normal(f"{head}latent", 1, 1, WIDTH)
  draw.linear(f"{head}q", WIDTH, WIDTH)
  draw.linear(f"{head}kv", 2 * WIDTH, WIDTH)
  draw.linear(f"{head}proj", WIDTH, WIDTH)
  draw.norm(f"{head}norm", WIDTH)
  draw.mlp(f"{head}mlp.", WIDTH, 2 * WIDTH)
  open_clip_text(draw, "text.", WIDTH)
  draw.linear("text.text_projection", WIDTH, WIDTH)
  draw.scale(bias=True)


def open_clip_projectors(draw):
  timm_trunk(draw, token=True, scaled=True)
  draw.linear("visual.head.mlp.fc1", 2 * EMBED, WIDTH)
  draw.linear("visual.head.mlp.fc2", EMBED, 2 * EMBED, bias=False)
  bert(draw, "text.transformer.", "roberta", pooler=False)
  hidden = (TEXT_WIDTH + EMBED) // 2
  draw.linear("text.proj.0", hidden, TEXT_WIDTH, bias=False)
  draw.linear("text.proj.2", EMBED, hidden, bias=False)
  draw.scale()


# --- configs ------------------------------------------------------------------------------------


def hf_config(kind, width, heads, mlp, activation, epsilon, **more):
  return dict(
    model_type=kind,
    hidden_size=width,
    num_attention_heads=heads,
    intermediate_size=mlp,
    num_hidden_layers=DEPTH,
    hidden_act=activation,
    layer_norm_eps=epsilon,
    **more,
  )


def image_config(kind, activation="gelu", epsilon=1e-6, **more):
  sizes = dict(image_size=SIZE, patch_size=PATCH, num_channels=3)
  return hf_config(kind, WIDTH, HEADS, MLP, activation, epsilon, **sizes, **more)


def dinov2_config(kind="dinov2", **more):
  extra = dict(mlp_ratio=DINO_RATIO, qkv_bias=True, layerscale_value=1.0, use_swiglu_ffn=False)
  config = image_config(kind, **extra | more)
  del config["intermediate_size"]
  return config


def text_config(kind, activation="gelu", epsilon=1e-12, rows=LENGTH, **more):
  sizes = dict(vocab_size=VOCABULARY, max_position_embeddings=rows)
  return hf_config(kind, TEXT_WIDTH, TEXT_HEADS, TEXT_MLP, activation, epsilon, **sizes, **more)


BERT = text_config("bert", pad_token_id=0, type_vocab_size=2)
ROBERTA = text_config("roberta", epsilon=1e-5, rows=LENGTH + 2, pad_token_id=1, type_vocab_size=1)
VIT = image_config("vit", epsilon=1e-12, qkv_bias=True, pooler_act="tanh")


def siglip_config(kind, **image):
  act = "gelu_pytorch_tanh"
  of_image = image_config(f"{kind}_vision_model", act, vision_use_head=True) | image
  of_text = text_config(f"{kind}_text_model", act, 1e-6, projection_size=WIDTH, pad_token_id=1)
  if "num_patches" in of_image:
    del of_image["image_size"]
  return dict(model_type=kind, vision_config=of_image, text_config=of_text)


def clip_config(activation, eos):
  return dict(
    model_type="clip",
    projection_dim=EMBED,
    vision_config=image_config("clip_vision_model", activation, 1e-5),
    text_config=text_config("clip_text_model", activation, 1e-5, eos_token_id=eos),
  )


def dual_config(image, text):
  kind = "vision-text-dual-encoder"
  return dict(model_type=kind, projection_dim=EMBED, vision_config=image, text_config=text)


def open_clip_config(embed, vision, text, statistics="clip", **more):
  mean, std, mode = dict(
    clip=([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711], "shortest"),
    half=([0.5] * 3, [0.5] * 3, "squash"),
  )[statistics]
  return dict(
    model_cfg=dict(embed_dim=embed, vision_cfg=dict(image_size=SIZE, **vision), text_cfg=text)
    | more,
    preprocess_cfg=dict(mean=mean, std=std, interpolation="bicubic", resize_mode=mode),
  )


OC_VISION = dict(layers=DEPTH, width=WIDTH, patch_size=PATCH, head_width=WIDTH // HEADS)
OC_VISION |= dict(mlp_ratio=2.0)
OC_TEXT = dict(context_length=LENGTH, vocab_size=VOCABULARY, layers=DEPTH, mlp_ratio=2.0)
OC_CLIP_TEXT = OC_TEXT | dict(width=TEXT_WIDTH, heads=TEXT_HEADS)
OC_SIGLIP_TEXT = OC_TEXT | dict(
  width=WIDTH,
  heads=HEADS,
  no_causal_mask=True,
  proj_bias=True,
  pool_type="last",
  norm_kwargs=dict(eps=1e-6),
)
OC_SIGLIP_IMAGE = dict(timm_model_name="vit_tiny_small_siglip", timm_pool="map", timm_proj="none")
OC_DINO_IMAGE = dict(timm_model_name="vit_tiny_small_dinov2", timm_pool="", timm_proj="mlp")
OC_ROBERTA = dict(
  hf_model_name="./small-roberta",
  hf_tokenizer_name="./small-roberta",
  hf_model_pretrained=False,
  hf_pooler_type="mean_pooler",
  hf_proj_type="mlp",
)
OF_SIGLIP = dict(statistics="half", custom_text=True, init_logit_bias=-10)


# --- inputs -------------------------------------------------------------------------------------

IMAGES = {"": (2, SIZE, SIZE)}
LARGER, OBLONG = {"_interp": (2, 24, 24)}, {"_nonsquare": (2, 12, 28)}
LENGTHS = np.array([[LENGTH], [7], [3]])


def draw_images(rng, shapes):
  return {
    f"pixel_values{suffix}": rng.standard_normal((n, 3, h, w)).astype(np.float32)
    for suffix, (n, h, w) in shapes.items()
  }


def draw_texts(rng, kind):
  """kind: "clip" begins and ends with special ids, "bert" pads with 0, the others pad with 1."""
  ids = rng.integers(4, VOCABULARY - 2, (len(LENGTHS), LENGTH))
  real = np.arange(LENGTH) < LENGTHS
  end = VOCABULARY - 1
  if kind.startswith("clip"):
    ids[:, 0] = end - 1
    np.put_along_axis(ids, LENGTHS - 1, end, 1)
  pad = dict(bert=0, clip=end, clip_zeros=0).get(kind, 1)
  arrays = dict(input_ids=np.where(real, ids, pad), attention_mask=real.astype(np.int64))
  if kind == "bert":
    arrays["token_type_ids"] = (np.arange(LENGTH) >= 5) * arrays["attention_mask"]
  return arrays


def draw_patches(rng):
  """Padded patches of three aspects, as NaFlex has them."""
  shapes = np.array([[4, 5], [3, 4], [2, 7]])
  mask = np.arange(20) < shapes.prod(1, keepdims=True)
  x = rng.standard_normal((3, 20, 3 * PATCH**2)) * mask[..., None]
  return dict(
    pixel_values=x.astype(np.float32),
    pixel_attention_mask=mask.astype(np.int64),
    spatial_shapes=shapes,
  )


# --- cases --------------------------------------------------------------------------------------


def cases():
  """(name, tensors, config, inputs, where they are from)."""

  def case(name, tensors, config, images=None, texts=None, drop=()):
    draw = Draw(name)
    tensors(draw)
    io = {}
    if images is not None:
      io |= draw_patches(draw.rng) if images == "patches" else draw_images(draw.rng, images)
    if texts:
      io |= {k: x for k, x in draw_texts(draw.rng, texts).items() if k not in drop}
    return name, draw.tensors, config, io

  no_mask = ("attention_mask",)
  yield case("hf_siglip", siglip, siglip_config("siglip"), IMAGES | LARGER, "siglip", drop=no_mask)
  yield case(
    "hf_siglip2_naflex",
    lambda draw: siglip(draw, patches_are_flat=True),
    siglip_config("siglip2", num_patches=GRID**2),
    "patches",
    "siglip",
    drop=no_mask,
  )
  eos = VOCABULARY - 1
  yield case("hf_clip", clip, clip_config("quick_gelu", eos), IMAGES, "clip")
  yield case("hf_clip_legacy_eos2", clip, clip_config("gelu", 2), IMAGES, "clip_zeros")
  every = IMAGES | LARGER | OBLONG
  yield case("hf_dinov2", dinov2, dinov2_config(), every)
  yield case(
    "hf_dinov2_swiglu",
    lambda draw: dinov2(draw, gated=True),
    dinov2_config(use_swiglu_ffn=True),
    IMAGES,
  )
  yield case(
    "hf_dinov2_reg",
    lambda draw: dinov2(draw, registers=REGISTERS),
    dinov2_config("dinov2_with_registers", num_register_tokens=REGISTERS),
    every,
  )
  yield case("hf_vit", vit, VIT, IMAGES | LARGER)
  yield case(
    "hf_dinov3",
    dinov3,
    image_config(
      "dinov3_vit",
      epsilon=1e-5,
      num_register_tokens=REGISTERS,
      rope_theta=100.0,
      query_bias=True,
      key_bias=False,
      value_bias=True,
      proj_bias=True,
      mlp_bias=True,
      use_gated_mlp=False,
      layerscale_value=1.0,
    ),
    IMAGES | OBLONG,
  )
  yield case("hf_bert", bert, BERT, texts="bert")
  yield case("st_bert_mean", bert, BERT, texts="bert")
  yield case("hf_roberta", lambda draw: bert(draw, kind="roberta"), ROBERTA, texts="roberta")
  xlmr = ROBERTA | dict(model_type="xlm-roberta")
  yield case("hf_xlmr", lambda draw: bert(draw, kind="roberta"), xlmr, texts="roberta")
  mpnet = ROBERTA | dict(model_type="mpnet", relative_attention_num_buckets=32)
  del mpnet["type_vocab_size"]
  yield case("hf_mpnet", lambda draw: bert(draw, kind="mpnet"), mpnet, texts="roberta")
  yield case(
    "hf_vtde_vit_bert",
    lambda draw: dual(draw, vit, "bert"),
    dual_config(VIT, BERT),
    IMAGES,
    "bert",
    drop=("token_type_ids",),
  )
  yield case(
    "hf_vtde_dinov2_roberta",
    lambda draw: dual(draw, dinov2, "roberta"),
    dual_config(dinov2_config(), ROBERTA),
    IMAGES,
    "roberta",
  )
  plain = open_clip_config(EMBED, OC_VISION, OC_CLIP_TEXT)
  yield case("oc_vit_b32_like", open_clip_vit, plain, IMAGES, "clip_zeros", drop=no_mask)
  quick = open_clip_config(EMBED, OC_VISION, OC_CLIP_TEXT, quick_gelu=True)
  yield case("oc_vit_b32_quickgelu_like", open_clip_vit, quick, IMAGES, "clip_zeros", drop=no_mask)
  exact = open_clip_config(WIDTH, OC_SIGLIP_IMAGE, OC_SIGLIP_TEXT, **OF_SIGLIP)
  yield case("oc_siglip_like", open_clip_siglip, exact, IMAGES, "siglip", drop=no_mask)
  tanh = OC_SIGLIP_TEXT | dict(act_kwargs=dict(approximate="tanh"))
  tanh = open_clip_config(WIDTH, OC_SIGLIP_IMAGE, tanh, **OF_SIGLIP)
  yield case("oc_siglip2_like", open_clip_siglip, tanh, IMAGES, "siglip", drop=no_mask)
  mlps = open_clip_config(EMBED, OC_DINO_IMAGE, OC_ROBERTA, custom_text=True)
  yield case(
    "oc_dinov2reg_roberta_mlp", open_clip_projectors, mlps, IMAGES, "roberta", drop=no_mask
  )


SENTENCE_MODULES = [
  dict(idx=0, name="0", path="", type="sentence_transformers.models.Transformer"),
  dict(idx=1, name="1", path="1_Pooling", type="sentence_transformers.models.Pooling"),
  dict(idx=2, name="2", path="2_Normalize", type="sentence_transformers.models.Normalize"),
]
POOLING = dict(
  word_embedding_dimension=TEXT_WIDTH,
  pooling_mode_cls_token=False,
  pooling_mode_mean_tokens=True,
  pooling_mode_max_tokens=False,
  pooling_mode_mean_sqrt_len_tokens=False,
)


def big_vision(tensors):
  """SigLIP's tensors by the names and shapes of big_vision's two_towers."""
  arrays = {}

  def put(path, x):
    arrays[f"params/{path}"] = x

  def dense(path, name):
    put(f"{path}/kernel", tensors[f"{name}.weight"].T)
    put(f"{path}/bias", tensors[f"{name}.bias"])

  def norm(path, name):
    put(f"{path}/scale", tensors[f"{name}.weight"])
    put(f"{path}/bias", tensors[f"{name}.bias"])

  def attention(path, weights, biases, out, heads):
    for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
      put(f"{path}/{part}/kernel", weight.T.reshape(len(weight), heads, -1))
      put(f"{path}/{part}/bias", bias.reshape(heads, -1))
    kernel = tensors[f"{out}.weight"].T
    put(f"{path}/out/kernel", kernel.reshape(heads, -1, kernel.shape[1]))
    put(f"{path}/out/bias", tensors[f"{out}.bias"])

  def mlp(path, name):
    dense(f"{path}/Dense_0", f"{name}.fc1")
    dense(f"{path}/Dense_1", f"{name}.fc2")

  def blocks(path, prefix, heads):
    for i in range(DEPTH):
      block, names = f"{prefix}encoder.layers.{i}.", f"{path}/encoderblock_{i}"
      norm(f"{names}/LayerNorm_0", f"{block}layer_norm1")
      norm(f"{names}/LayerNorm_1", f"{block}layer_norm2")
      parts = [f"{block}self_attn.{k}_proj" for k in "qkv"]
      weights, biases = ([tensors[f"{k}.{leaf}"] for k in parts] for leaf in ("weight", "bias"))
      out = f"{block}self_attn.out_proj"
      attention(f"{names}/MultiHeadDotProductAttention_0", weights, biases, out, heads)
      mlp(f"{names}/MlpBlock_0", f"{block}mlp")

  v, t, head = "vision_model.", "text_model.", "vision_model.head."
  put(
    "img/embedding/kernel", tensors[f"{v}embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0)
  )
  put("img/embedding/bias", tensors[f"{v}embeddings.patch_embedding.bias"])
  put("img/pos_embedding", tensors[f"{v}embeddings.position_embedding.weight"][None])
  blocks("img/Transformer", v, HEADS)
  norm("img/Transformer/encoder_norm", f"{v}post_layernorm")
  put("img/MAPHead_0/probe", tensors[f"{head}probe"])
  fused = (np.split(tensors[f"{head}attention.in_proj_{leaf}"], 3) for leaf in ("weight", "bias"))
  attention(
    "img/MAPHead_0/MultiHeadDotProductAttention_0", *fused, f"{head}attention.out_proj", HEADS
  )
  norm("img/MAPHead_0/LayerNorm_0", f"{head}layernorm")
  mlp("img/MAPHead_0/MlpBlock_0", f"{head}mlp")
  put("txt/Embed_0/embedding", tensors[f"{t}embeddings.token_embedding.weight"])
  put("txt/pos_embedding", tensors[f"{t}embeddings.position_embedding.weight"][None])
  blocks("txt/Encoder_0", t, TEXT_HEADS)
  norm("txt/Encoder_0/encoder_norm", f"{t}final_layer_norm")
  dense("txt/head", f"{t}head")
  put("t", tensors["logit_scale"])
  put("b", tensors["logit_bias"])
  return arrays


def write_json(file, content):
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(content, indent=1) + "\n")


def main():
  heads, names = dict(vision=HEADS, text=TEXT_HEADS), []
  for name, tensors, config, io in cases():
    folder = FOLDER / name
    of_open_clip = "model_cfg" in config
    write_json(folder / ("open_clip_config.json" if of_open_clip else "config.json"), config)
    file = "open_clip_model.safetensors" if of_open_clip else "model.safetensors"
    save_file(tensors, folder / file, metadata={"format": "pt"})
    results = outputs(tensors, config, io, heads)
    io |= {k: x.astype(np.float32) for k, x in results.items()}
    np.savez_compressed(folder / "io.npz", **io)
    write_json(folder / "meta.json", dict(name=name, inputs_and_outputs="io.npz"))
    names.append(name)
    if name == "st_bert_mean":
      write_json(folder / "modules.json", SENTENCE_MODULES)
      write_json(folder / "1_Pooling/config.json", POOLING)
      about = dict(max_seq_length=LENGTH, do_lower_case=False)
      write_json(folder / "sentence_bert_config.json", about)
    if name == "hf_siglip":
      other = FOLDER / "bv_siglip_npz"
      write_json(
        other / "meta.json", dict(name=other.name, inputs_and_outputs="../hf_siglip/io.npz")
      )
      np.savez_compressed(other / "weights.npz", **big_vision(tensors))
  about = {side: dict(heads=n) for side, n in heads.items()}
  write_json(FOLDER / "index.json", dict(which="small", cases=names) | about)


if __name__ == "__main__":
  main()
