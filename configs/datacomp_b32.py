"""DataComp's training at its small scale: CLIP ViT-B/32, 12.8 million samples.

  bigalign train --config=datacomp_b32 \
    --config.data.source='/data/small/shards/{00000000..00001287}.tar' \
    --config.data.tokenizer.path=/data/bpe_simple_vocab_16e6.txt.gz

https://arxiv.org/abs/2304.14108. Its rules fix the model and the training, and compare filters of
the data: zero-shot top-1 on ImageNet from 2.5 without a filter to 5.1. The medium scale is this
config with --config.total_steps=31250, 128 million samples of its own pool: 17.6 to 29.7. For 8
chips of TPU v5e (2x4). Difference: each sample is seen once before any is seen again; the release
draws shards with replacement. docs/recipes/datacomp_small.md and datacomp_medium.md hold the data,
the cost and the figures of others.
"""

from ml_collections import ConfigDict, config_dict


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.total_steps = 3_125  # x 4,096 = 12.8 million samples
  c.batch_size = 4_096
  c.log_every = 50
  c.checkpoint_every = 625
  c.diagnose_every = 0
  c.eval_every = 0
  c.ema = 0.0
  c.frozen = ""

  c.data = dict(
    source="/data/small/shards/{00000000..00001287}.tar",
    image_size=224,
    tokenizer=dict(name="clip", path=config_dict.placeholder(str), length=77),
    augment=dict(crop="random_resized", scale=(0.9, 1.0)),
    resize="shortest",
    workers=16,
  )
  c.model = dict(
    image=dict(
      name="vit",
      variant="B",
      patch=32,
      patch_bias=False,
      pool="cls",
      class_position=True,
      pre_norm=True,
      activation="gelu",
      epsilon=1e-5,
      remat="dots",
    ),
    text=dict(
      name="text",
      variant="B",
      vocab_size=49_408,
      length=77,
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
    lr=5e-4,
    b1=0.9,
    b2=0.98,
    eps=1e-6,
    schedule="cosine",
    warmup=500,
    weight_decay=0.2,
    decay=r"/(kernel|embedding|positions|class_position)$",
    clip_norm=None,
  )
  c.evals = dict()
  c.keep = dict(last=2)
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.topology = "v5e:2x4"
  return c
