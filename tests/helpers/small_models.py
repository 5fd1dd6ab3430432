"""Small models of each kind, and runs with random parameters of them."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np

from bigalign import tree
from bigalign.config import resolve_config
from bigalign.evaluate import Run
from bigalign.options import plain

SIZE = dict(width=16, depth=2, heads=2, mlp_ratio=2.0)


def clip(size=SIZE, *, vocab_size=9, length=8, embed_dim=12):
  """CLIP as Hugging Face knows it."""
  common = dict(activation="quick_gelu", epsilon=1e-5, **size)
  vision = dict(pool="cls", class_position=True, pre_norm=True, patch_bias=False, **common)
  text = dict(vocab_size=vocab_size, length=length, causal=True, pool="eos", **common)
  return dict(
    image=dict(name="vit", patch=8, **vision),
    text=dict(name="text", **text),
    embed_dim=embed_dim,
    pixels="clip",
  )


def siglip(size=SIZE, *, vocab_size=259, length=16, mask_padding=False):
  """SigLIP, whose embeddings are as wide as its towers."""
  text = dict(vocab_size=vocab_size, length=length, pool="last", mask_padding=mask_padding)
  return dict(
    image=dict(name="vit", patch=8, pool="map", **size),
    text=dict(name="text", **text, **size),
    embed_dim=size["width"],
    image_projector=dict(name="identity"),
    text_projector=dict(name="linear", bias=True),
  )


CLIP, SIGLIP = clip(), siglip()
# A ViT without CLIP's norm before the blocks, with CLIP's text and with text towers of BERT's kind.
PLAIN = dict(
  image=dict(name="vit", patch=8, pool="cls", activation="gelu", **SIZE),
  text=dict(CLIP["text"], activation="gelu", scan=False),
  embed_dim=12,
  pixels="clip",
)
BERT = dict(
  PLAIN,
  text=dict(name="bert", vocab_size=9, length=8, pool="pooler", **SIZE),
)
ROBERTA = dict(
  image=dict(PLAIN["image"], pool="pooler", class_position=True),
  text=dict(BERT["text"], types=1, pad=1, skip_padding=True, scan=False),
  embed_dim=12,
)
MPNET = dict(PLAIN, text=dict(ROBERTA["text"], types=0, buckets=32))
CLIP_LOSS, SIGLIP_LOSS = dict(clip=dict(weight=1.0)), dict(siglip=dict(weight=1.0))


def word_pieces(tmp_path, first="[PAD] [UNK]"):
  """A WordPiece vocabulary whose end has the highest id."""
  file = tmp_path / "vocab.txt"
  file.write_text("\n".join(f"{first} [CLS] a cat dog photo of [SEP]".split()))
  return dict(name="wordpiece", path=str(file), length=8)


def pieces_for(model, tmp_path):
  """Word pieces padded with the token that the text tower takes for padding."""
  return word_pieces(tmp_path, "[UNK] [PAD]" if model["text"].get("pad") else "[PAD] [UNK]")


def make_run(
  tmp_path, model, loss, tokenizer, *, resize="squash", seed=0, scale=0.3, bias=-7, **more
):
  """A run at step 3, with parameters of random numbers.

  Args:
    tmp_path: whose folder "run" is made.
    model, loss, tokenizer, resize: as in a config.
    seed: of the parameters.
    scale: of the parameters.
    bias: of the logits of SigLIP.
    more: other options of config.data.
  """
  data = dict(source="glyphs", image_size=16, tokenizer=tokenizer, resize=resize, **more)
  numbers = dict(seed=0, batch_size=4, total_steps=3, log_every=1, checkpoint_every=0)
  config = resolve_config(
    dict(data=data, model=model, loss=loss, optimizer=dict(lr=1e-3), **numbers)
  )
  text = jnp.zeros((1, tokenizer["length"]), jnp.int32)
  if model["text"]["name"] == "features":
    text = jnp.zeros((1, *config.model.text.row_shape))
  init = config.model.build().init
  shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 16, 16, 3), jnp.uint8), text)
  rng = np.random.default_rng(seed)
  params = {
    path: scale * rng.standard_normal(x.shape).astype(np.float32) + path.endswith("/scale")
    for path, x in tree.flatten(shapes["params"], "model/").items()
  }
  for name in {"clip", "siglip"} & {*loss}:
    params[f"loss/{name}/t"] = np.float32(2.3)
  if "siglip" in loss:
    params["loss/siglip/b"] = np.float32(bias)
  (tmp_path / "run").mkdir(exist_ok=True)
  rows = [{"step": 2, "val/x": 0.5}, {"step": 3, "val/x": 0.625, "train/loss": 1.0}]
  (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
  meta = dict(samples_seen=12, dataset_size=1000, data="f" * 16, revision="abc", versions={})
  meta["config"] = plain(config)
  return Run(tmp_path / "run", 3, config, meta, None, params, {}, {})
