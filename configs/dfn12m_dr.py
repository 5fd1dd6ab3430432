"""CLIP ViT-B/16 on DFN-12M with two stored teachers: MobileCLIP2's training at its small scale.

  export STORES=/stores/dfn12m
  bigalign train --config=dfn12m_dr --config.data.source='/data/dfn12m/{00000..01279}.tar' \
    --config.data.tokenizer.path=/data/bpe_simple_vocab_16e6.txt.gz

https://arxiv.org/abs/2508.20691. Batch, steps, learning rate, decays, the share of the teachers and
their logit scales are those of the released script for DFNDR-12M. Its MobileCLIP-B has a zero-shot
top-1 on ImageNet of 65.9. For 32 chips of TPU v5e (4x8). Differences: the image tower is CLIP's
B/16, without the convolutions in front of MobileCLIP-B; `bigalign reinforce` and `bigalign embed`
write the views and the vectors, because the released ones are of other views.
docs/recipes/dfn12m_dr.md holds the data, the stores, the cost and the figures of others.
"""

from ml_collections import ConfigDict, config_dict


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.total_steps = 30_000  # x 8,192 = 246 million images, each with two captions
  c.batch_size = 8_192
  c.log_every = 50
  c.checkpoint_every = 1_000
  c.diagnose_every = 0
  c.eval_every = 5_000
  c.ema = 0.0
  c.frozen = ""

  c.data = dict(
    source="/data/dfn12m/{00000..01279}.tar",
    image_size=224,
    captions=("txt",),
    second_captions=("json.syn",),  # synthetic ones, of which one is drawn
    teachers=dict(
      l14=dict(
        image="$STORES/l14/image", text="$STORES/l14/text", second="$STORES/l14_syn/text", width=768
      ),
      l14_s39b=dict(
        image="$STORES/l14_s39b/image",
        text="$STORES/l14_s39b/text",
        second="$STORES/l14_s39b_syn/text",
        width=768,
      ),
    ),
    tokenizer=dict(name="clip", path=config_dict.placeholder(str), length=77),
    augment=dict(
      crop="random_resized", scale=(0.08, 1.0), rand_augment=dict(num_ops=2, magnitude=9.0)
    ),
    resize="shortest",
    workers=16,
  )
  c.model = dict(
    image=dict(
      name="vit",
      variant="B",
      patch=16,
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
  c.loss = dict(
    mobileclip_dr=dict(weight=1.0, soft_share=1.0, second_text=True, teacher_scales=(70.0, 60.0))
  )
  c.logits = dict(way="auto", dtype="float32")
  c.microbatches = 1
  c.gradient_dtype = "float32"
  c.optimizer = dict(
    name="adamw",
    lr=1e-3,
    b1=0.9,
    b2=0.95,
    eps=1e-6,
    schedule="cosine",
    warmup=1_000,
    weight_decay=0.2,
    decay=r"/(kernel|embedding|positions|class_position)$",
    clip_norm=1.0,
  )
  c.evals = dict()
  c.keep = dict(last=2)
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.topology = "v5e:4x8"
  return c
