"""CLIP ViT-B/16 on CC3M, 40 epochs: the baseline of SLIP.

  bigalign train --config=cc3m_b16 \
    --config.data.source='/data/cc3m/cc3m-train-{0000..0575}.tar' \
    --config.data.tokenizer.path=/data/bpe_simple_vocab_16e6.txt.gz

https://arxiv.org/abs/2112.12750. Batch, learning rate, weight decay, length and augmentation are
those of the released code, whose ViT-B/16 has a zero-shot top-1 on ImageNet of 17.1. For 16 chips
of TPU v5e (4x4). Differences: towers compute in bfloat16 instead of float16, texts are tokenised
with CLIP's own cleaning, and the images of CC3M that could still be downloaded are others.
docs/recipes/cc3m.md holds the data, the cost and the figures of others.
"""

from ml_collections import ConfigDict, config_dict


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.total_steps = 28_400  # x 4,096 = 40 epochs of 2.91 million pairs
  c.batch_size = 4_096
  c.log_every = 50
  c.checkpoint_every = 1_000
  c.diagnose_every = 0
  c.eval_every = 5_000
  c.ema = 0.0
  c.frozen = ""

  c.data = dict(
    source="/data/cc3m/cc3m-train-{0000..0575}.tar",
    image_size=224,
    tokenizer=dict(name="clip", path=config_dict.placeholder(str), length=77),
    augment=dict(crop="random_resized", scale=(0.5, 1.0)),
    resize="shortest",
    workers=16,
  )
  c.model = dict(
    image=dict(
      name="vit",
      variant="B",
      patch=16,
      pool="cls",
      class_position=True,
      activation="gelu",
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
      activation="quick_gelu",
      epsilon=1e-5,
      remat="dots",
    ),
    embed_dim=512,
    image_projector=dict(name="linear"),
    text_projector=dict(name="linear"),
    pixels="imagenet",
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
    eps=1e-8,
    schedule="cosine",
    warmup=710,  # one epoch
    end=1e-5,
    weight_decay=0.5,
    decay=r"/(kernel|embedding|positions|class_token|class_position)$",
    clip_norm=None,
  )
  c.evals = dict()
  c.keep = dict(last=2)
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.topology = "v5e:4x4"
  return c
