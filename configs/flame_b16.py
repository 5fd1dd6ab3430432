"""FLAME: a B/16 learns from several stored caption embeddings per image, of a language model.

  export STORES=/stores/flame
  bigalign train --config=flame_b16 --config.data.source='/data/{00000..01499}.tar'

https://arxiv.org/abs/2411.11927, as released. The language model is frozen. It reads each long
caption after several prompts, each of which asks for one facet: entities, interactions, the scene.
$STORES/facets holds the embeddings, 5,120 wide (Mistral-Nemo), with those of an image as rows of
one sample: seven facets of a long caption, three of a short one, and those of single templates;
docs/frozen.md documents how another program writes such a store, and how evaluators read one. Each
step draws six of each image without replacement, all of them are positives of the sigmoid loss, and
the sum over pairs is divided by the number of texts. Texts have no projector: images are mapped to
the width of the language model. Not from the release: the first scale and bias, which are SigLIP's.
"""

from ml_collections import ConfigDict


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.total_steps = 156_250  # x 3,072: 32 epochs of 15 million images
  c.batch_size = 3_072
  c.log_every = 50
  c.checkpoint_every = 1_000
  c.diagnose_every = 0
  c.eval_every = 0
  c.ema = 0.0
  c.frozen = ""

  c.data = dict(
    source="/data/{00000..01499}.tar",
    stores=dict(image="", text="$STORES/facets", second=""),
    texts=dict(count=6),
    captions_per_image=16,  # at least the rows of an image in the store
    image_size=224,
    tokenizer=dict(name="byte", length=2),  # unused: the texts come from the store
    augment=dict(crop="random_resized", scale=(0.9, 1.0)),
    resize="shortest",
    workers=16,
  )
  c.model = dict(
    image=dict(name="vit", variant="B", patch=16, pool="cls", remat="dots"),
    text=dict(name="features", width=5_120),
    embed_dim=5_120,
    image_projector=dict(name="mlp_norm"),
    text_projector=dict(name="identity"),
  )
  c.loss = dict(siglip=dict(weight=1.0, texts="texts"))
  c.logits = dict(way="auto", dtype="float32")
  c.microbatches = 1
  c.optimizer = dict(
    name="adamw",
    lr=5e-4,
    b2=0.95,
    schedule="cosine",
    warmup=2_000,
    weight_decay=0.5,
    clip_norm=1.0,
  )
  c.evals = dict()
  c.keep = dict(last=2)
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.topology = "v5e:4x4"
  return c
