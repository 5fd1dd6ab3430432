"""CoCa ViT-L/14 at 224 pixels on your own shards, https://arxiv.org/abs/2205.01917.

  bigalign train --config=coca_l14 \
    --config.data.source='/data/{00000..41455}.tar' \
    --config.data.tokenizer.path=/data/bpe_simple_vocab_16e6.txt.gz

For 128 chips of TPU v5p (4x4x8). Model, loss weights (1 and 2) and lengths are those of open_clip's
coca_ViT-L-14: 256 queries pool the image, the text tower is the causal half of the decoder, and 12
layers with cross-attention follow. With config.model.init, open_clip's weights are read, those of
the decoder included. The paper's model of 2.1 billion parameters has a zero-shot top-1 on ImageNet
of 86.3. What differs from the paper: the sizes, one pooler instead of two, and data; batch and
optimizer are those of clip_b16 here, because open_clip states none for this model. The mask of
padding is the correct one; released weights need config.model.text.shifted_mask=True.
"""

from ml_collections import ConfigDict, config_dict


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.total_steps = 390_000  # x 32,768 = 12.8 billion pairs
  c.batch_size = 32_768
  c.log_every = 50
  c.checkpoint_every = 1_000
  c.eval_every = 10_000

  c.data = dict(
    source="/data/{00000..41455}.tar",
    image_size=224,
    tokenizer=dict(name="clip", path=config_dict.placeholder(str), length=76),
    augment=dict(crop="random_resized", scale=(0.9, 1.0)),
    resize="shortest",
    workers=16,
  )
  c.model = dict(
    image=dict(
      name="vit",
      variant="L",
      patch=14,
      patch_bias=False,
      class_token=True,
      class_position=True,
      pre_norm=True,
      pool="queries",
      queries=256,
      query_width=768,
      query_heads=8,
      activation="gelu",
      epsilon=1e-5,
      remat="dots",
    ),
    text=dict(
      name="text",
      variant="B",
      vocab_size=49_408,
      length=76,
      causal=True,
      pool="class",
      activation="gelu",
      epsilon=1e-5,
      remat="dots",
    ),
    embed_dim=768,
    image_projector=dict(name="linear"),
    text_projector=dict(name="linear"),
    pixels="clip",
  )
  c.loss = dict(clip=dict(weight=1.0), coca=dict(weight=2.0, depth=12, heads=12, remat="dots"))
  c.optimizer = dict(
    name="adamw",
    lr=5e-4,
    b1=0.9,
    b2=0.98,
    eps=1e-6,
    schedule="cosine",
    warmup=10_000,
    weight_decay=0.2,
    decay=r"/(kernel|embedding|positions|class_position|queries)$",
    clip_norm=1.0,
  )
  c.evals = dict()
  c.keep = dict(last=2, every=50_000)
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.topology = "v5p:4x4x8"
  return c
