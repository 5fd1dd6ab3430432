"""CLIP ViT-B/16 at 224 pixels on your own shards, https://arxiv.org/abs/2103.00020.

  bigalign train --config=clip_b16 \
    --config.data.source='/data/{00000..41455}.tar' \
    --config.data.tokenizer.path=/data/bpe_simple_vocab_16e6.txt.gz

For 256 chips of TPU v5e (16x16) or 32 H100s. Model and optimizer are those of open_clip's ViT-B-16,
whose run on LAION-400M (batch 33,792, 32 epochs) has a zero-shot top-1 on ImageNet of 67.1;
`bigalign export --format=hf` writes it as a CLIPModel. Gradients are clipped at 1, which open_clip
does with --grad-clip-norm only. Without a tokenizer path, the vocabulary of an installed
open_clip_torch is used.

Changed since it was first shipped, because it was not that model: a norm before the blocks, a
position of the class token, patches without a bias, norms with an epsilon of 1e-5, and weight decay
of the token table and the positions, as open_clip decays every tensor with two or more axes.
"""

from ml_collections import ConfigDict, config_dict


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.total_steps = 390_000  # x 32,768 = 12.8 billion pairs
  c.batch_size = 32_768
  c.log_every = 50
  c.checkpoint_every = 1_000
  c.diagnose_every = 0
  c.eval_every = 10_000
  c.ema = 0.0
  c.frozen = ""

  c.data = dict(
    source="/data/{00000..41455}.tar",
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
  c.loss = dict(clip=dict(weight=1.0))
  c.logits = dict(way="auto", dtype="float32")
  c.microbatches = 1
  c.gradient_dtype = "float32"
  c.optimizer = dict(
    name="adamw",
    lr=5e-4,
    b1=0.9,
    b2=0.98,
    eps=1e-6,
    schedule="cosine",
    warmup=10_000,
    weight_decay=0.2,
    decay=r"/(kernel|embedding|positions|class_position)$",
    clip_norm=1.0,
  )
  c.evals = dict()
  c.keep = dict(last=2, every=50_000)
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.topology = "v5e:16x16"
  return c
