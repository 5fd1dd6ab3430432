"""SigLIP B/16 at 224 pixels on your own shards, https://arxiv.org/abs/2303.15343.

  bigalign train --config=siglip_b16 \
    --config.data.source='/data/{00000..41455}.tar' --config.data.tokenizer.path=/data/c4_en.model

For 64 chips of TPU v5e (8x8) or 8 H100s. The tokenizer is a SentencePiece model of 32,000 pieces;
the published model uses C4's English T5 vocabulary.

Changed since it was first shipped: updates are not clipped by Adafactor (gradients are), as in
big_vision. The weight decay has big_vision's form and number; at this learning rate it is the same
as 0.1 times the learning rate.
"""

from ml_collections import ConfigDict


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.total_steps = 100_000  # x 16,384 = 1.6 billion pairs
  c.batch_size = 16_384
  c.log_every = 50
  c.checkpoint_every = 1_000
  c.diagnose_every = 0
  c.eval_every = 5_000
  c.ema = 0.0
  c.frozen = ""

  c.data = dict(
    source="/data/{00000..41455}.tar",
    image_size=224,
    tokenizer=dict(name="sentencepiece", path="/data/c4_en.model", length=64, lower=True),
    augment=dict(crop="squash"),
    resize="squash",
    workers=16,
  )
  c.model = dict(
    image=dict(name="vit", variant="B", patch=16, pool="map", remat="dots"),
    text=dict(
      name="text",
      variant="B",
      vocab_size=32_000,
      length=64,
      pool="last",
      mask_padding=False,
      weight_init="big_vision",
      remat="dots",
    ),
    embed_dim=768,
    image_projector=dict(name="identity"),
    text_projector=dict(name="linear", bias=True),
    pixels="half",
  )
  c.loss = dict(siglip=dict(weight=1.0))
  c.logits = dict(way="auto", dtype="float32")
  c.microbatches = 1
  c.gradient_dtype = "float32"
  c.optimizer = dict(
    name="adafactor",
    lr=1e-3,
    b2=0.95,
    schedule="cosine",
    warmup="5%",
    independent_weight_decay=1e-4,
    clip_norm=1.0,
  )
  c.evals = dict()
  c.keep = dict(last=2, every=20_000)
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.topology = "v5e:8x8"
  return c
