"""Runs in seconds, for tests and first steps: bigalign train --config=tiny"""

from ml_collections import ConfigDict


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.total_steps = 40
  c.batch_size = 64
  c.log_every = 10
  c.checkpoint_every = 20
  c.eval_every = 0
  c.ema = 0.9
  c.frozen = ""

  c.data = dict(
    source="glyphs",
    image_size=32,
    tokenizer=dict(name="byte", length=48),
    augment=dict(crop="random_resized", scale=(0.8, 1.0)),
    workers=0,
  )
  c.model = dict(
    image=dict(
      name="vit", variant="Ti", patch=8, width=64, depth=2, heads=8, scan=False, dtype="float32"
    ),
    text=dict(
      name="text",
      variant="Ti",
      vocab_size=259,
      length=48,
      width=64,
      depth=2,
      heads=8,
      pool="mean",
      scan=False,
      dtype="float32",
    ),
    embed_dim=64,
  )
  c.loss = dict(siglip=dict(weight=1.0))
  c.optimizer = dict(name="adamw", lr=1e-3, warmup="10%", weight_decay=0.1)
  c.evals = dict(
    val=dict(type="retrieval", source="glyphs:heldout", batch_size=64),
  )
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.topology = "v5e:1x1"
  return c
