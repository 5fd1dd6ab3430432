"""FLIP ViT-B/16: half of the patches for 12.8 billion pairs, then a short tuning with all of them.

  bigalign train --config=flip_b16 --config.data.source='/data/{00000..41455}.tar'

https://arxiv.org/abs/2212.00794. Batch size, learning rates, warmups and lengths of both stages
follow the released code, whose epochs have 1,281,167 pairs: 10,000 epochs masked and 100 unmasked.
Its B/16 has a zero-shot top-1 on ImageNet of 68.0 after this on LAION-400M. Differences: the
moments of the optimizer go on, the text tower pools its last token instead of its first, and the
mean of the patches leaves out the class token. For 256 chips of TPU v5e (16x16).

Changed since it was first shipped: the image tower has a class token, texts attend to padding, the
token table has weight decay, and no gradient is clipped, as in the released code.
"""

from ml_collections import ConfigDict


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.stages = (
    dict(  # x 65,536 = 12.8 billion pairs, 32 epochs of LAION-400M
      until=195_491,
      microbatches=1,
      model=dict(image=dict(patch_dropout=0.5)),
      optimizer=dict(lr=1.024e-3, warmup=391),
    ),
  )
  c.total_steps = 197_446  # 1,955 x 65,536 = 128 million more, 0.32 epochs
  c.batch_size = 65_536
  c.log_every = 50
  c.checkpoint_every = 1_000
  c.diagnose_every = 0
  c.eval_every = 5_000
  c.ema = 0.0
  c.frozen = ""

  c.data = dict(
    source="/data/{00000..41455}.tar",
    image_size=224,
    tokenizer=dict(name="wordpiece", path="/data/bert_base_uncased_vocab.txt", length=32),
    augment=dict(crop="random_resized", scale=(0.5, 1.0), flip=0.5),
    resize="shortest",
    workers=16,
  )
  c.model = dict(
    image=dict(
      name="vit",
      variant="B",
      patch=16,
      pool="mean",
      class_token=True,
      positions="sincos2d",
      activation="gelu",
      remat="dots",
    ),
    text=dict(
      name="text",
      variant="B",
      vocab_size=30_522,
      length=32,
      width=512,
      heads=8,
      pool="last",
      mask_padding=False,
      activation="gelu",
      remat="dots",
    ),
    embed_dim=512,
    image_projector=dict(name="linear"),
    text_projector=dict(name="linear"),
    pixels="imagenet",
  )
  c.loss = dict(clip=dict(weight=1.0))
  c.logits = dict(way="auto", dtype="float32")
  c.microbatches = 2
  c.gradient_dtype = "float32"
  c.optimizer = dict(
    name="adamw",
    lr=1.024e-5,  # of the tuning: 4e-8 for each 256 pairs of a batch
    b1=0.9,
    b2=0.95,
    schedule="cosine",
    warmup=391,
    weight_decay=0.2,
    decay=r"/(kernel|embedding)$",
    clip_norm=None,
  )
  c.evals = dict()
  c.keep = dict(last=2, every=50_000)
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.topology = "v5e:16x16"
  return c
