"""AltCLIP, second stage: a multilingual text tower learns from images; the image tower is locked.

  export ALTCLIP_1=runs/altclip_1 XLM_R=/models/xlm-roberta-large
  bigalign train --config=altclip_2 --config.data.source='/data/{00000..00199}.tar'

https://arxiv.org/abs/2211.06679. The run of the first stage holds CLIP L/14 and an XLM-R that has
learned the texts of CLIP without images; all of it is taken. The paper has two million pairs in
this stage; learning rate, batch and warmup are ours. The sizes of the towers are for `bigalign
plan`, which needs no run. For 16 chips of TPU v5e (4x4).
"""

from ml_collections import ConfigDict


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.total_steps = 2_000  # x 1,024 = 2 million pairs
  c.batch_size = 1_024
  c.log_every = 20
  c.checkpoint_every = 500
  c.diagnose_every = 0
  c.eval_every = 500
  c.ema = 0.0
  c.frozen = "image_tower|image_projector"

  c.data = dict(
    source="/data/{00000..00199}.tar",
    image_size=224,
    tokenizer=dict(name="hf", path="$XLM_R/tokenizer.json", length=77),
    augment=dict(crop="random_resized", scale=(0.9, 1.0)),
    resize="shortest",
    workers=16,
  )
  c.model = dict(
    init="$ALTCLIP_1",
    image=dict(
      name="vit",
      variant="L",
      patch=14,
      pool="cls",
      patch_bias=False,
      class_position=True,
      pre_norm=True,
      activation="quick_gelu",
    ),
    text=dict(
      name="bert",
      variant="L",
      vocab_size=250_002,
      length=512,
      types=1,
      pad=1,
      skip_padding=True,
      pool="cls",
      remat="dots",
    ),
    embed_dim=768,
    pixels="clip",
  )
  c.loss = dict(clip=dict(weight=1.0))
  c.optimizer = dict(
    name="adamw",
    lr=1e-5,
    b2=0.98,
    schedule="cosine",
    warmup=100,
    weight_decay=0.05,
    clip_norm=1.0,
  )
  c.evals = dict()
  c.keep = dict(last=2)
  c.mesh = dict(data=-1, fsdp=4, tensor=1)
  c.topology = "v5e:4x4"
  return c
