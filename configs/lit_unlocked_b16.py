"""LiT B/16, then unlocked: both towers learn at the end, at a tenth of the learning rate.

  export IMAGE_TOWER=/models/vit-base-patch16-224-in21k
  bigalign train --config=lit_unlocked_b16 --config.data.source='/data/{00000..41455}.tar'

The first stage is configs/lit_b16.py: https://arxiv.org/abs/2111.07991. Then the image tower learns
too, with new moments and a warmup. To unlock only its last blocks, give config.frozen a regular
expression of those that stay locked: docs/stages.md.

Changed since it was first shipped, as configs/lit_b16.py: the weight decay is not times the
learning rate, updates are not clipped, and the text tower begins with big_vision's random values.
"""

from ml_collections import ConfigDict


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.stages = (
    dict(  # x 16,384 = 901 million pairs
      until=55_000,
      frozen="image_tower",
      optimizer=dict(lr=1e-3, warmup=10_000),
    ),
  )
  c.total_steps = 60_000
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
    tokenizer=dict(name="wordpiece", path="/data/bert_base_uncased_vocab.txt", length=16),
    augment=dict(crop="random_resized", scale=(0.8, 1.0)),
    resize="squash",
    workers=16,
  )
  c.model = dict(
    image=dict(init="$IMAGE_TOWER", name="vit", variant="B", patch=16, remat="dots"),
    text=dict(
      name="text",
      variant="B",
      vocab_size=30_522,
      length=16,
      pool="last",
      mask_padding=False,
      weight_init="big_vision",
      remat="dots",
    ),
    embed_dim=768,
    image_projector=dict(name="identity"),
    text_projector=dict(name="linear", bias=True),
  )
  c.loss = dict(clip=dict(weight=1.0))
  c.logits = dict(way="auto", dtype="float32")
  c.microbatches = 1
  c.optimizer = dict(
    name="adafactor",
    lr=1e-4,
    b2=0.99,
    schedule="cosine",
    warmup=500,
    independent_weight_decay=1e-4,
    clip_norm=1.0,
  )
  c.evals = dict()
  c.keep = dict(last=2)
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.topology = "v5e:8x8"
  return c
