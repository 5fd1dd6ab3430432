"""ViT-B/32 on CC12M with the sigmoid loss and Muon, 32 epochs.

  bigalign train --config=cc12m_b32 \
    --config.data.source='/data/cc12m/cc12m-train-{0000..2175}.tar' \
    --config.data.tokenizer.path=/data/bpe_simple_vocab_16e6.txt.gz

https://huggingface.co/rwightman/ViT-B-32.cc12m-siglip has a zero-shot top-1 on ImageNet of 42.7
after 32 epochs. Towers, loss, batch, epochs, learning rate and weight decay are those of its card.
For 8 chips of TPU v5e (2x4). Differences: its optimizer, NAdaMuon, also divides the update of each
weight by a second moment; the card does not name warmup, crops and the clipping of gradients.
docs/recipes/cc12m.md holds the data, the cost and the figures of others.
"""

from ml_collections import ConfigDict, config_dict


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.total_steps = 85_700  # x 4,096 = 32 epochs of 10.97 million pairs
  c.batch_size = 4_096
  c.log_every = 50
  c.checkpoint_every = 1_000
  c.diagnose_every = 0
  c.eval_every = 10_000
  c.ema = 0.0
  c.frozen = ""

  c.data = dict(
    source="/data/cc12m/cc12m-train-{0000..2175}.tar",
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
  c.loss = dict(siglip=dict(weight=1.0))
  c.logits = dict(way="auto", dtype="float32")
  c.microbatches = 1
  c.gradient_dtype = "float32"
  c.optimizer = dict(
    name="muon",
    lr=3e-3,
    b1=0.9,
    b2=0.98,
    eps=1e-6,
    schedule="cosine",
    warmup=2_000,
    weight_decay=0.25,
    decay=r"/(kernel|embedding|positions|class_position)$",
    clip_norm=1.0,
  )
  c.evals = dict()
  c.keep = dict(last=2)
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.topology = "v5e:2x4"
  return c
