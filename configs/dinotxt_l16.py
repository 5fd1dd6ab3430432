"""dino.txt: a text tower and two blocks on a frozen DINOv3 L/16, https://arxiv.org/abs/2412.16334.

  export IMAGE_TOWER=/models/dinov3-vitl16-pretrain-lvd1689m
  bigalign train --config=dinotxt_l16 \
    --config.data.source='/data/{00000..41455}.tar' \
    --config.data.tokenizer.path=/data/bpe_simple_vocab_16e6.txt.gz

For 64 chips of TPU v5e (8x8). Sizes, batch and optimizer are those of DINOv3's release of dino.txt:
two blocks with SwiGLU, LayerScale and drop path on the tokens of the frozen tower; class token and
mean of the patches, concatenated; a text tower of 24 layers from scratch. For segmentation, patches
are compared with the second half of a text's embedding. Published: 81.4 % top-1 on ImageNet,
zero-shot, on DINOv2 L/14 with registers (the paper's figure, as its authors repeat it in
https://github.com/facebookresearch/dinov2/pull/528). Those on DINOv3 L/16 are in section 7.3 of
https://arxiv.org/abs/2508.10104. What differs: registers of the tower take no part in the blocks;
the data. The release's optional Gram term is `gram=dict(weight=1.0, of="projector")`.
"""

from ml_collections import ConfigDict


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.total_steps = 50_000  # x 8,192 = 410 million pairs
  c.batch_size = 8_192
  c.log_every = 50
  c.checkpoint_every = 1_000
  c.diagnose_every = 0
  c.eval_every = 5_000
  c.ema = 0.0
  c.frozen = "image_tower/"

  c.data = dict(
    source="/data/{00000..41455}.tar",
    image_size=224,
    tokenizer=dict(name="clip", path="/data/bpe_simple_vocab_16e6.txt.gz", length=77),
    augment=dict(crop="random_resized", scale=(0.9, 1.0)),
    resize="shortest",
    workers=16,
  )
  c.model = dict(
    image=dict(init="$IMAGE_TOWER", name="vit", variant="L", patch=16, pool="cls"),
    text=dict(
      name="text",
      width=1_280,
      depth=24,
      heads=20,
      vocab_size=49_408,
      length=77,
      pool="last",
      activation="gelu",
      remat="dots",
    ),
    embed_dim=2_048,
    image_projector=dict(name="blocks", depth=2, drop_path=0.3, dtype="bfloat16"),
    text_projector=dict(name="linear"),
  )
  c.loss = dict(clip=dict(weight=1.0))
  c.logits = dict(way="auto", dtype="float32")
  c.microbatches = 1
  c.gradient_dtype = "float32"
  c.optimizer = dict(
    name="adamw",
    lr=7e-4,
    b1=0.9,
    b2=0.99,
    schedule="cosine",
    warmup=2_000,
    weight_decay=1e-4,
    clip_norm=None,
  )
  c.evals = dict()
  c.keep = dict(last=2)
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.topology = "v5e:8x8"
  return c
