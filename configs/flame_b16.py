"""After FLAME: a B/16 learns from stored caption embeddings of a large language model.

  export STORES=/stores/flame
  bigalign train --config=flame_b16 --config.data.source='/data/{00000..01499}.tar'

https://arxiv.org/abs/2411.11927. The language model is frozen. It reads each long caption after
several prompts, each of which asks for one facet: entities, interactions, the scene. $STORES/facets
holds the embeddings, 5,120 wide (Mistral-Nemo), with the facets of an image as rows of one sample;
docs/frozen.md documents how another program writes such a store. Each step draws one facet of each
image at random. Sizes, loss and schedule are CLIP's, not FLAME's.
"""

from ml_collections import ConfigDict


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.total_steps = 60_000  # x 8,192: 32 epochs of 15 million images
  c.batch_size = 8_192
  c.log_every = 50
  c.checkpoint_every = 1_000
  c.diagnose_every = 0
  c.eval_every = 0
  c.ema = 0.0
  c.frozen = ""

  c.data = dict(
    source="/data/{00000..01499}.tar",
    stores=dict(image="", text="$STORES/facets", second=""),
    image_size=224,
    tokenizer=dict(name="byte", length=2),  # unused: the texts come from the store
    augment=dict(crop="random_resized", scale=(0.4, 1.0), flip=0.5),
    resize="shortest",
    workers=16,
  )
  c.model = dict(
    image=dict(name="vit", variant="B", patch=16, pool="cls", remat="dots"),
    text=dict(name="features", width=5_120),
    embed_dim=768,
    image_projector=dict(name="linear"),
    text_projector=dict(name="linear"),
  )
  c.loss = dict(clip=dict(weight=1.0))
  c.logits = dict(way="auto", dtype="float32")
  c.microbatches = 1
  c.optimizer = dict(
    name="adamw",
    lr=5e-4,
    b2=0.98,
    schedule="cosine",
    warmup=2_000,
    weight_decay=0.2,
    clip_norm=1.0,
  )
  c.evals = dict()
  c.keep = dict(last=2)
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.topology = "v5e:8x8"
  return c
