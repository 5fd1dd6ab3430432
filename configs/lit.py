"""A frozen vision tower and a trainable sentence encoder, on your own shards.

  export IMAGE_TOWER=/models/dinov2-base TEXT_TOWER=/models/all-MiniLM-L6-v2
  bigalign train --config=lit --config.data.source='/data/{00000..00331}.tar'

Both are Hugging Face folders, from which the sizes are read; docs/weights.md lists the families.
The image tower is locked as in https://arxiv.org/abs/2111.07991.
"""

from ml_collections import ConfigDict


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.total_steps = 20_000  # x 4,096 = 82 million pairs
  c.batch_size = 4_096
  c.log_every = 50
  c.checkpoint_every = 1_000
  c.diagnose_every = 0
  c.eval_every = 2_000
  c.ema = 0.0
  c.frozen = "image_tower"

  c.data = dict(
    source="/data/{00000..00331}.tar",
    image_size=224,
    tokenizer=dict(name="hf", path="$TEXT_TOWER/tokenizer.json", length=64),
    augment=dict(crop="random_resized", scale=(0.8, 1.0)),
    resize="shortest",
    workers=16,
  )
  c.model = dict(
    image=dict(init="$IMAGE_TOWER"),
    text=dict(init="$TEXT_TOWER", scan=False),  # separate layers: own learning rates
    embed_dim=512,
  )
  c.loss = dict(siglip=dict(weight=1.0))
  c.optimizer = dict(
    name="adamw",
    lr=1e-3,
    schedule="cosine",
    warmup="5%",
    weight_decay=0.01,
    # Pretrained layers learn more slowly than the projectors, the first layers slowest.
    multipliers=(
      *((f"text_tower/encoder/block_{i}/", 0.1 * 0.8 ** (6 - i)) for i in range(6)),
      ("text_tower/", 0.1 * 0.8**6),
    ),
  )
  c.evals = dict()
  c.keep = dict(last=2)
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.topology = "v5e:4x4"
  return c
