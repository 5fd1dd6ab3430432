"""LiT B/16: a frozen pretrained image tower and a text tower trained from scratch.

  export IMAGE_TOWER=/models/vit-base-patch16-224-in21k
  bigalign train --config=lit_b16 --config.data.source='/data/{00000..41455}.tar'

https://arxiv.org/abs/2111.07991: the setting Lu, a locked image tower without a projector, and an
unlocked text tower. configs/lit.py also starts from a pretrained text tower.

Changed since it was first shipped: the weight decay of 1e-4 was times the learning rate, a thousand
times less than in big_vision, where it is not. Updates are not clipped and the text tower begins
with big_vision's random values, as there.
"""

from ml_collections import ConfigDict


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.total_steps = 55_000  # x 16,384 = 901 million pairs
  c.batch_size = 16_384
  c.log_every = 50
  c.checkpoint_every = 1_000
  c.diagnose_every = 0
  c.eval_every = 5_000
  c.ema = 0.0
  c.frozen = "image_tower"

  c.data = dict(
    source="/data/{00000..41455}.tar",
    image_size=224,
    tokenizer=dict(name="wordpiece", path="/data/bert_base_uncased_vocab.txt", length=16),
    augment=dict(crop="random_resized", scale=(0.8, 1.0)),
    resize="squash",
    workers=16,
  )
  c.model = dict(
    image=dict(init="$IMAGE_TOWER", name="vit", variant="B", patch=16),
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
    lr=1e-3,
    b2=0.99,
    schedule="cosine",
    warmup=10_000,
    independent_weight_decay=1e-4,
    clip_norm=1.0,
  )
  c.evals = dict()
  c.keep = dict(last=2)
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.topology = "v5e:8x8"
  return c
