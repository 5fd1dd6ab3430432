"""SAIL: two gated projectors on frozen DINOv2-L and NV-Embed-v2, trained from stores.

  export IMAGE_TOWER=/models/dinov2-large STORES=/stores/sail
  bigalign embed --config=sail_dinov2l_nv2 --out=$STORES --towers=image
  bigalign train --config=sail_dinov2l_nv2

https://arxiv.org/abs/2412.04616, as released. $STORES/raw and $STORES/long are embedding
stores, 4,096 wide: the output of NV-Embed-v2, without an instruction, for the alt text and for the
long or short recaption of each image. docs/frozen.md documents how `bigalign embed --with`
writes them, and how evaluators read stores. The dataset is the 23 million pairs of CC3M, CC12M and
YFCC15M with the captions of DreamLIP.

Changed since it was first shipped: images are resized to 256 pixels and 224 are cropped, as
released, instead of resized to 224.
"""

from ml_collections import ConfigDict


def get_config():
  c = ConfigDict()
  c.seed = 42
  c.total_steps = 70_200  # x 32,768: 100 epochs of 23 million pairs
  c.batch_size = 32_768
  c.log_every = 50
  c.checkpoint_every = 1_000
  c.diagnose_every = 0
  c.eval_every = 0
  c.ema = 0.0
  c.frozen = "_tower/"

  c.data = dict(
    source="/data/{00000..02299}.tar",
    stores=dict(image="$STORES/image", text="$STORES/raw", second="$STORES/long"),
    image_size=224,
    tokenizer=dict(name="byte", length=2),  # unused: the texts come from the stores
    resize="shortest",
    resize_edge=256,
    workers=16,
  )
  c.model = dict(
    image=dict(init="$IMAGE_TOWER", name="vit", variant="L", patch=14, pool="cls+mean"),
    text=dict(name="features", width=4_096),
    embed_dim=1_024,
    image_projector=dict(name="gated"),
    text_projector=dict(name="gated"),
  )
  c.loss = dict(sail=dict(weight=1.0))
  c.logits = dict(way="auto", dtype="float32")
  c.microbatches = 1
  c.optimizer = dict(
    name="lion",
    lr=1e-5,
    b1=0.9,
    b2=0.99,
    schedule="cosine",
    warmup="10%",
    weight_decay=1e-4,
    decay=".",
    clip_norm=None,
  )
  c.evals = dict()
  c.keep = dict(last=2)
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.topology = "v5e:4x4"
  return c
