"""CLIPA ViT-B/16: most samples with small images and short texts, the last few at full size.

  bigalign train --config=clipa_b16 \
    --config.data.source='/data/{00000..41455}.tar' \
    --config.data.tokenizer.path=/data/bpe_simple_vocab_16e6.txt.gz

https://arxiv.org/abs/2305.07017. Six epochs of LAION-400M at 112 pixels, 7 x 7 patches, and 16
tokens, then 131 million pairs at 224 pixels and 32 tokens. Batch size, positions, augmentation and
optimizer follow the released recipe B/16 I50 T16, except for the gradient clipping. Batch size,
length and schedule of the second stage follow the authors' JAX code, which tunes with a warmup and
a cosine of their own. The moments of the optimizer go on. For 256 chips of TPU v5e (16x16) or 32
H100s.
"""

from ml_collections import ConfigDict, config_dict


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.stages = (
    dict(  # x 65,536 = 2.4 billion pairs
      until=36_621,
      batch_size=65_536,
      data=dict(image_size=112, tokenizer=dict(length=16)),
      optimizer=dict(lr=2.048e-3, warmup=782),
    ),
  )
  c.total_steps = 40_621  # 4,000 x 32,768 = 131 million more
  c.batch_size = 32_768
  c.log_every = 50
  c.checkpoint_every = 1_000
  c.diagnose_every = 0
  c.eval_every = 5_000
  c.ema = 0.0
  c.frozen = ""

  c.data = dict(
    source="/data/{00000..41455}.tar",
    image_size=224,
    tokenizer=dict(name="clip", path=config_dict.placeholder(str), length=32),
    augment=dict(crop="random_resized", scale=(0.4, 1.0)),
    resize="shortest",
    workers=16,
  )
  c.model = dict(
    image=dict(
      name="vit",
      variant="B",
      patch=16,
      pool="cls",
      positions="sincos2d",
      activation="gelu",
      remat="dots",
    ),
    text=dict(
      name="text",
      variant="B",
      vocab_size=49_408,
      length=32,
      width=512,
      heads=8,
      causal=True,
      pool="eos",
      activation="gelu",
      remat="dots",
    ),
    embed_dim=512,
    image_projector=dict(name="linear"),
    text_projector=dict(name="linear"),
    pixels="clip",
  )
  c.loss = dict(clip=dict(weight=1.0))
  c.logits = dict(way="auto", dtype="float32")
  c.microbatches = 1
  c.gradient_dtype = "float32"
  c.optimizer = dict(
    name="adamw",
    lr=1.024e-4,  # of the second stage: 8e-7 for each 256 pairs of a batch
    b1=0.9,
    b2=0.95,
    schedule="cosine",
    warmup=800,
    weight_decay=0.2,
    clip_norm=1.0,
  )
  c.evals = dict()
  c.keep = dict(last=2, every=10_000)
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.topology = "v5e:16x16"
  return c
