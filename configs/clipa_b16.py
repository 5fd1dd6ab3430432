"""CLIPA ViT-B/16: most samples with small images and short texts, the last few at full size.

  bigalign train --config=clipa_b16 \
    --config.data.source='/data/{00000..41455}.tar' \
    --config.data.tokenizer.path=/data/bpe_simple_vocab_16e6.txt.gz

https://arxiv.org/abs/2305.07017. The authors' PyTorch recipe for B/16, I50 T16: six epochs of
LAION-400M at 112 pixels, 7 x 7 patches, then 131 million pairs at 224 pixels with a warmup and a
cosine of their own, always with 16 tokens. Their weights have a zero-shot top-1 on ImageNet of
63.2. Differences: the moments of the optimizer go on in the second stage, which the release begins
without them; positions stay fixed there, and the release learns them. For 256 chips of TPU v5e
(16x16) or 32 H100s.

Changed since it was first shipped, because it mixed two releases: the second stage was that of the
authors' JAX code (batch 32,768, 32 tokens). The tower is open_clip's, as in the PyTorch code (a
norm before the blocks, patches without a bias, weight decay of the token table and its positions),
and no gradient is clipped.
"""

from ml_collections import ConfigDict, config_dict


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.stages = (
    dict(  # x 65,536 = 2.4 billion pairs
      until=36_621,
      batch_size=65_536,
      data=dict(image_size=112),
      optimizer=dict(lr=2.048e-3, warmup=782),
    ),
  )
  c.total_steps = 52_621  # 16,000 x 8,192 = 131 million more
  c.batch_size = 8_192
  c.log_every = 50
  c.checkpoint_every = 1_000
  c.diagnose_every = 0
  c.eval_every = 5_000
  c.ema = 0.0
  c.frozen = ""

  c.data = dict(
    source="/data/{00000..41455}.tar",
    image_size=224,
    tokenizer=dict(name="clip", path=config_dict.placeholder(str), length=16),
    augment=dict(crop="random_resized", scale=(0.4, 1.0)),
    resize="shortest",
    workers=16,
  )
  c.model = dict(
    image=dict(
      name="vit",
      variant="B",
      patch=16,
      patch_bias=False,
      pool="cls",
      positions="sincos2d",
      pre_norm=True,
      activation="gelu",
      epsilon=1e-5,
      remat="dots",
    ),
    text=dict(
      name="text",
      variant="B",
      vocab_size=49_408,
      length=16,
      width=512,
      heads=8,
      causal=True,
      pool="eos",
      activation="gelu",
      epsilon=1e-5,
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
    lr=2.56e-5,  # of the second stage: 8e-7 for each 256 pairs of a batch
    b1=0.9,
    b2=0.95,
    schedule="cosine",
    eps=1e-6,
    warmup=3_072,
    weight_decay=0.2,
    decay=r"/(kernel|embedding|positions)$",
    clip_norm=None,
  )
  c.evals = dict()
  c.keep = dict(last=2, every=10_000)
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.topology = "v5e:16x16"
  return c
