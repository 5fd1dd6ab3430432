"""AltCLIP, first stage: a multilingual text tower learns the texts of CLIP, without images.

  export CLIP_L14=/models/clip-vit-large-patch14 XLM_R=/models/xlm-roberta-large STORES=/data/stores
  bigalign train --config=altclip_1 --config.data.source='/data/parallel/{00000..00099}.jsonl'

$STORES/clip_l14/text holds the vectors of the English sentences: `bigalign embed --towers=text`
writes it with a config of the same source, data.images=False, data.captions=("en",) and
model=dict(init="$CLIP_L14").

https://arxiv.org/abs/2211.06679. A sample has an English sentence, "en", and its translation,
"other"; both learn the vector that CLIP L/14 gives the English one, by the mean squared error. The
paper's student learns CLIP's state before its projection, ours the vector after it, which makes
its projector new; the image side of CLIP waits for the second stage, configs/altclip_2.py. The
paper states neither learning rate nor steps; those here are ours. The sizes of the towers are for
`bigalign plan`, which needs no checkpoint. For 16 chips of TPU v5e (4x4).
"""

from ml_collections import ConfigDict


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.total_steps = 36_000  # x 1,024 = 36 million sentences
  c.batch_size = 1_024
  c.log_every = 20
  c.checkpoint_every = 2_000
  c.diagnose_every = 0
  c.eval_every = 0
  c.ema = 0.0
  c.frozen = ""

  c.data = dict(
    source="/data/parallel/{00000..00099}.jsonl",
    images=False,
    captions=(("en", 1.0), ("other", 1.0)),
    teachers=dict(
      clip=dict(
        text=dict(en="$STORES/clip_l14/text", other="$STORES/clip_l14/text"),
        width=768,
      ),
    ),
    image_size=224,
    tokenizer=dict(name="hf", path="$XLM_R/tokenizer.json", length=77),
    resize="shortest",
    workers=16,
  )
  c.model = dict(
    init="$CLIP_L14",
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
      init="$XLM_R",
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
  c.loss = dict(feature_distill=dict(weight=1.0, kind="mse", w_img=0.0))
  c.optimizer = dict(
    name="adamw",
    lr=1e-4,
    b2=0.98,
    schedule="cosine",
    warmup=1_000,
    weight_decay=0.05,
    clip_norm=1.0,
  )
  c.evals = dict()
  c.keep = dict(last=2)
  c.mesh = dict(data=-1, fsdp=4, tensor=1)
  c.topology = "v5e:4x4"
  return c
