"""Forward passes of published image and text towers in NumPy and float64.

They define the expected outputs of the tower tests, so they share no code with bigalign. They read
a checkpoint by the names of its tensors, as Hugging Face, timm and open_clip write them.
Sources: the papers of the models, and the published configs for norms, activations and pooling.
"""

from __future__ import annotations

import math

import numpy as np

# --- layers -------------------------------------------------------------------------------------

_erf = np.vectorize(math.erf, otypes=[np.float64])


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


ACTIVATIONS = dict(
  gelu=lambda x: x * (1 + _erf(x / math.sqrt(2))) / 2,
  gelu_pytorch_tanh=lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
  quick_gelu=lambda x: x * sigmoid(1.702 * x),
)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def linear(x, t, name):
  """x W^T + b; the bias is optional."""
  return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0)


def layer_norm(x, t, name, epsilon):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
  return x * t[f"{name}.weight"] + t[f"{name}.bias"]


def split_heads(x, heads):
  return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def attend(q, k, v, heads, bias=0, rotate=lambda x: x):
  """Multi-head attention; bias: added to the logits, broadcast to [B, heads, Lq, Lk]."""
  q, k, v = (split_heads(x, heads) for x in (q, k, v))
  q, k = rotate(q), rotate(k)
  weights = softmax(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]) + bias)
  out = (weights @ v).transpose(0, 2, 1, 3)
  return out.reshape(*out.shape[:2], -1)


def projections(t, prefix, names):
  """Functions that make queries, keys and values; `qkv` is one matrix of all three."""
  if "qkv" in names:
    weights = np.split(t[f"{prefix}{names['qkv']}weight"], 3)
    biases = np.split(t[f"{prefix}{names['qkv']}bias"], 3)
    return [lambda x, w=w, b=b: x @ w.T + b for w, b in zip(weights, biases)]
  return [lambda x, n=names[k]: linear(x, t, prefix + n) for k in ("q", "k", "v")]


# Names of the parts of a block, per library.
LAYOUTS = dict(
  hf=dict(
    block="encoder.layers.{}.",
    norm1="layer_norm1",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    out="self_attn.out_proj",
    norm2="layer_norm2",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
  ),
  vit=dict(
    block="encoder.layer.{}.",
    norm1="layernorm_before",
    q="attention.attention.query",
    k="attention.attention.key",
    v="attention.attention.value",
    out="attention.output.dense",
    norm2="layernorm_after",
    fc1="intermediate.dense",
    fc2="output.dense",
  ),
  dinov2=dict(
    block="encoder.layer.{}.",
    norm1="norm1",
    q="attention.attention.query",
    k="attention.attention.key",
    v="attention.attention.value",
    out="attention.output.dense",
    scale1="layer_scale1.lambda1",
    norm2="norm2",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    gated_in="mlp.weights_in",
    gated_out="mlp.weights_out",
    scale2="layer_scale2.lambda1",
  ),
  dinov3=dict(
    block="layer.{}.",
    norm1="norm1",
    q="attention.q_proj",
    k="attention.k_proj",
    v="attention.v_proj",
    out="attention.o_proj",
    scale1="layer_scale1.lambda1",
    norm2="norm2",
    fc1="mlp.up_proj",
    fc2="mlp.down_proj",
    scale2="layer_scale2.lambda1",
  ),
  bert=dict(
    block="encoder.layer.{}.",
    norm1="attention.output.LayerNorm",
    q="attention.self.query",
    k="attention.self.key",
    v="attention.self.value",
    out="attention.output.dense",
    norm2="output.LayerNorm",
    fc1="intermediate.dense",
    fc2="output.dense",
  ),
  mpnet=dict(
    block="encoder.layer.{}.",
    norm1="attention.LayerNorm",
    q="attention.attn.q",
    k="attention.attn.k",
    v="attention.attn.v",
    out="attention.attn.o",
    norm2="output.LayerNorm",
    fc1="intermediate.dense",
    fc2="output.dense",
  ),
  open_clip=dict(
    block="transformer.resblocks.{}.",
    norm1="ln_1",
    qkv="attn.in_proj_",
    out="attn.out_proj",
    norm2="ln_2",
    fc1="mlp.c_fc",
    fc2="mlp.c_proj",
  ),
  timm=dict(
    block="blocks.{}.",
    norm1="norm1",
    qkv="attn.qkv.",
    out="attn.proj",
    scale1="ls1.gamma",
    norm2="norm2",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    scale2="ls2.gamma",
  ),
)


def encoder(x, t, prefix, layout, heads, epsilon, activation, bias=0, rotate=lambda x: x):
  """All blocks of a transformer. BERT's kind norms after each residual, the others before."""
  names, act, i = LAYOUTS[layout], ACTIVATIONS[activation], 0
  after = layout in ("bert", "mpnet")

  def attention(x, block):
    q, k, v = (project(x) for project in projections(t, block, names))
    return linear(attend(q, k, v, heads, bias, rotate), t, block + names["out"])

  def mlp(x, block):
    if f"{block}{names.get('gated_in')}.weight" in t:
      gate, up = np.split(linear(x, t, block + names["gated_in"]), 2, -1)
      return linear(gate * sigmoid(gate) * up, t, block + names["gated_out"])
    return linear(act(linear(x, t, block + names["fc1"])), t, block + names["fc2"])

  while any(key.startswith(prefix + names["block"].format(i)) for key in t):
    block = prefix + names["block"].format(i)
    for part, norm, scale in ((attention, "norm1", "scale1"), (mlp, "norm2", "scale2")):
      if after:
        x = layer_norm(x + part(x, block), t, block + names[norm], epsilon)
      else:
        change = part(layer_norm(x, t, block + names[norm], epsilon), block)
        x = x + change * t.get(block + names.get(scale, ""), 1)
    i += 1
  return x


def map_head(x, t, prefix, heads, epsilon, activation, names, mask=None):
  """SigLIP's pooling: one learned query, then an MLP with a residual."""
  query = np.broadcast_to(t[prefix + names["query"]], (len(x), 1, x.shape[-1]))
  q, k, v = attention_pool_inputs(query, x, t, prefix, names)
  bias = 0 if mask is None else hide(mask)
  y = linear(attend(q, k, v, heads, bias), t, prefix + names["out"])
  z = layer_norm(y, t, prefix + names["norm"], epsilon)
  z = ACTIVATIONS[activation](linear(z, t, prefix + "mlp.fc1"))
  return (y + linear(z, t, prefix + "mlp.fc2"))[:, 0]


HF_HEAD = dict(query="probe", qkv="attention.in_proj_", out="attention.out_proj", norm="layernorm")
TIMM_HEAD = dict(query="latent", out="proj", norm="norm")


def attention_pool_inputs(query, x, t, prefix, names):
  if "qkv" in names:
    of_q, of_k, of_v = projections(t, prefix, names)
    return of_q(query), of_k(x), of_v(x)
  return linear(query, t, prefix + "q"), *np.split(linear(x, t, prefix + "kv"), 2, -1)


def hide(mask):
  """[B, L] of 1 for real tokens as an addition to logits."""
  return np.where(mask[:, None, None, :] > 0, 0, -1e30)


# --- images -------------------------------------------------------------------------------------


def cubic(x, a):
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = ((x - 5) * x + 8) * x * a - 4 * a
  return np.where(x < 1, near, np.where(x < 2, far, 0))


def triangle(x):
  return np.maximum(0, 1 - np.abs(x))


def resize_matrix(size, new, kind):
  """[new, size] of PyTorch's F.interpolate without aligned corners.

  kind: "bicubic" (a = -0.75, no antialias, edges repeated), "bicubic_antialias" (a = -0.5) or
  "bilinear_antialias". With antialias the filter widens when the image shrinks.
  """
  matrix, ratio = np.zeros((new, size)), size / new
  for i in range(new):
    center = (i + 0.5) * ratio - 0.5
    if kind == "bicubic":
      places = math.floor(center) + np.arange(-1, 3)
      weights = cubic(places - center, -0.75)
    else:
      places, wide = np.arange(size), max(ratio, 1)
      distance = (places - center) / wide
      weights = cubic(distance, -0.5) if kind == "bicubic_antialias" else triangle(distance)
      weights = weights / weights.sum()
    np.add.at(matrix[i], np.clip(places, 0, size - 1), weights)
  return matrix


def resized(table, grid, kind):
  """[G * G, D] positions for another grid, [h * w, D]."""
  side = math.isqrt(len(table))
  if grid == (side, side):
    return table
  rows, columns = (resize_matrix(side, n, kind) for n in grid)
  x = table.reshape(side, side, -1)
  x = np.einsum("hi,wj,ijd->hwd", rows, columns, x)
  return x.reshape(grid[0] * grid[1], -1)


def patches(images, t, name):
  """[B, 3, H, W] -> ([B, h * w, D], (h, w)); name: of the convolution of the patches."""
  kernel = t[f"{name}.weight"]
  size = kernel.shape[-1]
  b, c, height, width = images.shape
  grid = (height // size, width // size)
  x = images.reshape(b, c, grid[0], size, grid[1], size).transpose(0, 2, 4, 1, 3, 5)
  x = x.reshape(b, grid[0] * grid[1], -1) @ kernel.reshape(len(kernel), -1).T
  return x + t.get(f"{name}.bias", 0), grid


def rotary(grid, width, theta, extra):
  """DINOv3's rotary positions: angles of the patch centers in [-1, 1]; extra tokens have none."""
  frequencies = theta ** -np.arange(0, 1, 4 / width)
  centers = [2 * (np.arange(n) + 0.5) / n - 1 for n in grid]
  places = np.stack(np.meshgrid(*centers, indexing="ij"), -1).reshape(-1, 2)
  angles = 2 * np.pi * places[:, :, None] * frequencies
  angles = np.tile(angles.reshape(len(places), -1), 2)

  def rotate(x):
    first, second = np.split(x[:, :, extra:], 2, -1)
    turned = np.concatenate([-second, first], -1)
    moved = x[:, :, extra:] * np.cos(angles) + turned * np.sin(angles)
    return np.concatenate([x[:, :, :extra], moved], 2)

  return rotate


def vision(
  images,
  t,
  prefix,
  layout,
  *,
  heads,
  epsilon,
  activation,
  patch,
  positions=None,
  token=None,
  registers=None,
  resize="bicubic",
  pre_norm=None,
  theta=None,
):
  """Tokens of an image before the last norm: the class token, registers, patches.

  Positions have a row for the class token where they have one row more than the square grid.
  """
  x, grid = patches(images, t, prefix + patch)
  first = np.zeros((len(x), 0, x.shape[-1]))
  if token:
    row = t[prefix + token].reshape(1, 1, -1)
    first = np.broadcast_to(row, (len(x), 1, x.shape[-1]))
  if positions:
    table = t[prefix + positions]
    table = table.reshape(-1, table.shape[-1])
    own = len(table) - math.isqrt(len(table)) ** 2
    x = x + resized(table[own:], grid, resize)
    if own:
      first = first + table[:own]
  if registers:
    rows = np.broadcast_to(t[prefix + registers], (len(x), *t[prefix + registers].shape[1:]))
    first = np.concatenate([first, rows], 1)
  x = np.concatenate([first, x], 1)
  if pre_norm:
    x = layer_norm(x, t, prefix + pre_norm, epsilon)
  rotate = rotary(grid, x.shape[-1] // heads, theta, first.shape[1]) if theta else lambda x: x
  return encoder(x, t, prefix, layout, heads, epsilon, activation, rotate=rotate)


def naflex(io, t, prefix, c):
  """SigLIP 2 for patches of any aspect: (tokens after the last norm, pooled)."""
  x = linear(io["pixel_values"].astype(np.float64), t, prefix + "embeddings.patch_embedding")
  mask, table = io["pixel_attention_mask"], t[prefix + "embeddings.position_embedding.weight"]
  for row, shape in zip(x, io["spatial_shapes"]):
    own = resized(table, tuple(int(n) for n in shape), "bilinear_antialias")
    row[: len(own)] += own
    row[len(own) :] += own[0]  # padding has the first position
  heads, epsilon, activation = (
    c[k] for k in ("num_attention_heads", "layer_norm_eps", "hidden_act")
  )
  x = encoder(x, t, prefix, "hf", heads, epsilon, activation, hide(mask))
  x = layer_norm(x, t, prefix + "post_layernorm", epsilon)
  pooled = map_head(x, t, prefix + "head.", heads, epsilon, activation, HF_HEAD, mask)
  return x * mask[..., None], pooled


# --- texts --------------------------------------------------------------------------------------


def text(ids, t, prefix, layout, *, heads, epsilon, activation, names, causal, mask=None):
  """Tokens of CLIP's or SigLIP's text tower after the last norm."""
  tokens, positions, norm = names
  x = t[prefix + tokens][ids] + t[prefix + positions][: ids.shape[1]]
  bias = 0 if mask is None else hide(mask)
  if causal:
    length = ids.shape[1]
    bias = bias + np.where(np.tri(length) > 0, 0, -1e30)
  x = encoder(x, t, prefix, layout, heads, epsilon, activation, bias)
  return layer_norm(x, t, prefix + norm, epsilon)


HF_TEXT = (
  "embeddings.token_embedding.weight",
  "embeddings.position_embedding.weight",
  "final_layer_norm",
)
OPEN_CLIP_TEXT = ("token_embedding.weight", "positional_embedding", "ln_final")


def relative_buckets(length, buckets=32, farthest=128):
  """[L, L] of T5's buckets of the offset from query to key, both directions."""
  offset = np.arange(length)[None] - np.arange(length)[:, None]
  half = buckets // 2
  exact, distance = half // 2, np.abs(offset)
  with np.errstate(divide="ignore"):
    far = exact + np.floor(np.log(distance / exact) / np.log(farthest / exact) * (half - exact))
  far = np.minimum(far, half - 1)
  return (np.where(distance < exact, distance, far) + half * (offset > 0)).astype(int)


def bert(ids, mask, t, prefix, c, types=None):
  """(tokens, pooler or None) of BERT, RoBERTa, XLM-R and MPNet."""
  kind, pad = c["model_type"], c["pad_token_id"]
  names = "embeddings.{}"
  positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
  if kind != "bert":
    real = ids != pad
    positions = np.cumsum(real, 1) * real + pad
  x = t[prefix + names.format("word_embeddings.weight")][ids]
  x = x + t[prefix + names.format("position_embeddings.weight")][positions]
  if kind != "mpnet":
    table = t[prefix + names.format("token_type_embeddings.weight")]
    x = x + table[np.zeros_like(ids) if types is None else types]
  epsilon, heads = c["layer_norm_eps"], c["num_attention_heads"]
  x = layer_norm(x, t, prefix + "embeddings.LayerNorm", epsilon)
  bias = hide(mask)
  if kind == "mpnet":
    table = t[prefix + "encoder.relative_attention_bias.weight"]
    bias = bias + table[relative_buckets(ids.shape[1])].transpose(2, 0, 1)
  layout = "mpnet" if kind == "mpnet" else "bert"
  x = encoder(x, t, prefix, layout, heads, epsilon, c["hidden_act"], bias)
  pooler = None
  if f"{prefix}pooler.dense.weight" in t:
    pooler = np.tanh(linear(x[:, 0], t, prefix + "pooler.dense"))
  return x, pooler


def mean_of(tokens, mask):
  return (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)


# --- whole models: outputs by the names of the files --------------------------------------------


def sizes(c):
  return dict(
    heads=c["num_attention_heads"], epsilon=c["layer_norm_eps"], activation=c["hidden_act"]
  )


def pairs(image, txt, t):
  """Unit vectors and logits of projected images and texts."""
  zimg, ztxt = unit(image), unit(txt)
  logits = np.exp(t["logit_scale"].reshape(())) * zimg @ ztxt.T
  logits = logits + t.get("logit_bias", np.zeros(1)).reshape(())
  return dict(
    out_image_embeds=zimg,
    out_text_embeds=ztxt,
    out_logits_per_image=logits,
    out_logits_per_text=logits.T,
  )


def siglip(t, c, io):
  """SiglipModel and Siglip2Model (Zhai et al. 2023; Tschannen et al. 2025)."""
  of_image, of_text, p = c["vision_config"], c["text_config"], "vision_model."
  kind = sizes(of_image)

  def image(x):
    x = vision(
      x,
      t,
      p,
      "hf",
      **kind,
      patch="embeddings.patch_embedding",
      positions="embeddings.position_embedding.weight",
    )
    x = layer_norm(x, t, p + "post_layernorm", kind["epsilon"])
    return x, map_head(x, t, p + "head.", names=HF_HEAD, **kind)

  if io["pixel_values"].ndim == 3:
    last, pooled = naflex(io, t, p, of_image)
  else:
    last, pooled = image(io["pixel_values"])
  tokens = text(
    io["input_ids"], t, "text_model.", "hf", **sizes(of_text), names=HF_TEXT, causal=False
  )
  head = linear(tokens[:, -1], t, "text_model.head")
  results = pairs(pooled, head, t)
  results |= dict(out_vision_last_hidden_state=last, out_vision_pooler=pooled)
  results |= dict(out_text_last_hidden_state=tokens, out_text_pooler=head)
  if "pixel_values_interp" in io:
    results["out_vision_pooler_interp"] = image(io["pixel_values_interp"])[1]
  return results


def clip(t, c, io):
  """CLIPModel (Radford et al. 2021). An eos_token_id of 2 means the largest id."""
  of_image, of_text, p = c["vision_config"], c["text_config"], "vision_model."
  last = vision(
    io["pixel_values"],
    t,
    p,
    "hf",
    **sizes(of_image),
    patch="embeddings.patch_embedding",
    positions="embeddings.position_embedding.weight",
    token="embeddings.class_embedding",
    pre_norm="pre_layrnorm",
  )
  pooled = layer_norm(last[:, 0], t, p + "post_layernorm", of_image["layer_norm_eps"])
  ids, mask, eos = io["input_ids"], io["attention_mask"], of_text["eos_token_id"]
  ends = ids.argmax(1) if eos == 2 else (ids == eos).argmax(1)

  def texts(mask):
    x = text(ids, t, "text_model.", "hf", **sizes(of_text), names=HF_TEXT, causal=True, mask=mask)
    return x, x[np.arange(len(x)), ends]

  tokens, end = texts(mask)
  project = t["text_projection.weight"].T
  results = pairs(linear(pooled, t, "visual_projection"), end @ project, t)
  results |= dict(out_vision_last_hidden_state=last, out_vision_pooler=pooled)
  results |= dict(out_text_last_hidden_state=tokens * mask[..., None], out_text_pooler=end)
  results["out_text_embeds_nomask"] = unit(texts(None)[1] @ project)
  return results


DINO_PATCH = dict(
  patch="embeddings.patch_embeddings.projection",
  token="embeddings.cls_token",
  positions="embeddings.position_embeddings",
)


def image_tower(x, t, c, prefix=""):
  """(tokens after the last norm, pooled) of ViT, DINOv2 and DINOv3 of Hugging Face."""
  kind = c["model_type"]
  if kind == "dinov3_vit":
    tokens = vision(
      x,
      t,
      prefix,
      "dinov3",
      **sizes(c),
      patch="embeddings.patch_embeddings",
      token="embeddings.cls_token",
      registers="embeddings.register_tokens",
      theta=c["rope_theta"],
    )
    tokens = layer_norm(tokens, t, prefix + "norm", c["layer_norm_eps"])
    return tokens, tokens[:, 0]
  with_registers = kind == "dinov2_with_registers"
  tokens = vision(
    x,
    t,
    prefix,
    "vit" if kind == "vit" else "dinov2",
    **sizes(c),
    **DINO_PATCH,
    registers="embeddings.register_tokens" if with_registers else None,
    resize="bicubic_antialias" if with_registers else "bicubic",
  )
  tokens = layer_norm(tokens, t, prefix + "layernorm", c["layer_norm_eps"])
  if kind == "vit":
    return tokens, np.tanh(linear(tokens[:, 0], t, prefix + "pooler.dense"))
  return tokens, tokens[:, 0]


def image_only(t, c, io):
  """ViTModel, Dinov2Model with and without registers or SwiGLU, DINOv3ViTModel."""
  results = {}
  for name in [k for k in io if k.startswith("pixel_values")]:
    suffix = name.removeprefix("pixel_values")
    tokens, pooled = image_tower(io[name], t, c)
    results[f"out_last_hidden_state{suffix}"], results[f"out_pooler{suffix}"] = tokens, pooled
  return results


def text_only(t, c, io):
  """BertModel, RobertaModel, XLMRobertaModel, MPNetModel."""
  ids, mask = io["input_ids"], io["attention_mask"]
  tokens, pooler = bert(ids, mask, t, "", c)
  mean = mean_of(tokens, mask)
  results = dict(
    out_last_hidden_state=tokens * mask[..., None],
    out_pooler=pooler,
    out_mean=mean,
    out_mean_normalized=unit(mean),
    out_cls=tokens[:, 0],
  )
  if "token_type_ids" in io:
    typed, _ = bert(ids, mask, t, "", c, io["token_type_ids"])
    results["out_last_hidden_state_tt"] = typed * mask[..., None]
  return results


def dual_encoder(t, c, io):
  """VisionTextDualEncoderModel: linear projections of both poolers."""
  _, image = image_tower(io["pixel_values"], t, c["vision_config"], "vision_model.")
  _, pooler = bert(io["input_ids"], io["attention_mask"], t, "text_model.", c["text_config"])
  return pairs(linear(image, t, "visual_projection"), linear(pooler, t, "text_projection"), t)


def open_clip(t, c, io, heads):
  """CLIP and CustomTextCLIP of open_clip; heads: of timm's and Hugging Face's towers."""
  of_image, of_text = c["vision_cfg"], c["text_cfg"]
  activation = "quick_gelu" if c.get("quick_gelu") else "gelu"
  if "timm_model_name" in of_image:
    image = timm_image(io["pixel_values"], t, of_image, heads["vision"])
  else:
    tokens = vision(
      io["pixel_values"],
      t,
      "visual.",
      "open_clip",
      heads=of_image["width"] // of_image["head_width"],
      epsilon=1e-5,
      activation=activation,
      patch="conv1",
      positions="positional_embedding",
      token="class_embedding",
      pre_norm="ln_pre",
    )
    image = layer_norm(tokens[:, 0], t, "visual.ln_post", 1e-5) @ t["visual.proj"]
  ids = io["input_ids"]
  if "hf_model_name" in of_text:
    mask = (ids != 1).astype(np.int64)  # RoBERTa's padding
    like = dict(
      model_type="roberta",
      pad_token_id=1,
      layer_norm_eps=1e-5,
      num_attention_heads=heads["text"],
      hidden_act="gelu",
    )
    tokens, _ = bert(ids, mask, t, "text.transformer.", like)
    pooled = mean_of(tokens, mask)
    txt = linear(ACTIVATIONS["gelu"](linear(pooled, t, "text.proj.0")), t, "text.proj.2")
  else:
    custom = c.get("custom_text", False)
    prefix = "text." if custom else ""
    if of_text.get("act_kwargs"):
      activation = "gelu_pytorch_tanh"
    tokens = text(
      ids,
      t,
      prefix,
      "open_clip",
      heads=of_text["heads"],
      epsilon=of_text.get("norm_kwargs", {}).get("eps", 1e-5),
      activation=activation,
      names=OPEN_CLIP_TEXT,
      causal=not of_text.get("no_causal_mask", False),
    )
    if custom:
      txt = linear(tokens[:, -1], t, "text.text_projection")
    else:
      txt = tokens[np.arange(len(ids)), ids.argmax(1)] @ t["text_projection"]
  results = pairs(image, txt, t)
  return results | dict(out_image_features=image, out_text_features=txt)


def timm_image(images, t, c, heads):
  """A trunk of timm: SigLIP's with its own pooling, or DINOv2's with an MLP as projector."""
  p = "visual.trunk."
  kind = dict(heads=heads, epsilon=1e-6, activation="gelu")
  has_token = p + "cls_token" in t
  tokens = vision(
    images,
    t,
    p,
    "timm",
    **kind,
    patch="patch_embed.proj",
    positions="pos_embed",
    token="cls_token" if has_token else None,
    registers="reg_token" if p + "reg_token" in t else None,
  )
  tokens = layer_norm(tokens, t, p + "norm", 1e-6)
  if c["timm_pool"] == "map":
    return map_head(tokens, t, p + "attn_pool.", names=TIMM_HEAD, **kind)
  x = ACTIVATIONS["gelu"](linear(tokens[:, 0], t, "visual.head.mlp.fc1"))
  return linear(x, t, "visual.head.mlp.fc2")


FAMILIES = {
  "siglip": siglip,
  "siglip2": siglip,
  "clip": clip,
  "vit": image_only,
  "dinov2": image_only,
  "dinov2_with_registers": image_only,
  "dinov3_vit": image_only,
  "bert": text_only,
  "roberta": text_only,
  "xlm-roberta": text_only,
  "mpnet": text_only,
  "vision-text-dual-encoder": dual_encoder,
}


def outputs(tensors, config, io, heads):
  """{name of an output: array} of a checkpoint of any family here."""
  t = {key: np.asarray(x, np.float64) for key, x in tensors.items()}
  io = {key: x.astype(np.float64) if x.dtype.kind == "f" else x for key, x in io.items()}
  if "model_cfg" in config:
    return open_clip(t, config["model_cfg"], io, heads)
  return FAMILIES[config["model_type"]](t, config, io)
