"""freeze-align: token projectors on frozen DINOv2-L and all-roberta-large-v1.

  export IMAGE_TOWER=/models/dinov2-large TEXT_TOWER=/models/all-roberta-large-v1
  bigalign train --config=freeze_align_dinov2l_arl \
    --config.data.source='/data/{00000..01699}.tar'

https://arxiv.org/abs/2409.19425. The towers run in every step, because every token is projected and
the images are augmented; stores of `bigalign embed --tokens` can replace either tower. Differences
from the release: negatives come from the whole batch instead of the 1,800 pairs of one GPU; the
text tower has no dropout; RandAugment's strengths are torchvision's (translations of up to a third
of the side instead of 7 pixels, black outside instead of grey, brightness and sharpness fall too);
the temperature is learned as a logarithm, and has no weight decay; the learning rate changes every
step and not in stairs. `bigalign curate` makes the dataset.

Changed since it was first shipped: RandAugment draws from the release's ten operations instead of
torchvision's fourteen, and the temperature may fall to 0.001, as there, instead of 0.01.
"""

from ml_collections import ConfigDict


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.total_steps = 17_700  # x 14,400: 15 epochs of 17 million pairs
  c.batch_size = 14_400
  c.log_every = 50
  c.checkpoint_every = 1_000
  c.diagnose_every = 0
  c.eval_every = 0
  c.ema = 0.0
  c.frozen = "_tower/"

  c.data = dict(
    source="/data/{00000..01699}.tar",
    image_size=252,  # 18 patches of 14; the release crops them from 256 pixels
    tokenizer=dict(name="hf", path="$TEXT_TOWER/tokenizer.json", length=77),
    augment=dict(
      crop="random_resized",
      scale=(0.2, 1.0),
      flip=0.5,
      rand_augment=dict(
        num_ops=2,
        magnitude=21.0,  # 7 on a scale of 10
        operations=(
          "identity",
          "autocontrast",
          "equalize",
          "brightness",
          "sharpness",
          "shear_x",
          "shear_y",
          "translate_x",
          "translate_y",
          "rotate",
        ),
      ),
    ),
    resize="squash",
    workers=16,
  )
  c.model = dict(
    image=dict(init="$IMAGE_TOWER", name="vit", variant="L", patch=14, pool="cls"),
    text=dict(init="$TEXT_TOWER"),
    embed_dim=1_024,
    image_projector=dict(name="patches_and_class"),
    text_projector=dict(name="tokens"),
  )
  c.loss = dict(clip=dict(weight=1.0, t_max=1000.0))
  c.logits = dict(way="auto", dtype="float32")
  c.microbatches = 1
  c.optimizer = dict(
    name="adamw",
    lr=1e-3,
    b2=0.999,
    schedule="cosine",
    warmup=1_000,
    end=1e-5,
    weight_decay=0.02,
    clip_norm=None,
  )
  c.evals = dict()
  c.keep = dict(last=2)
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.topology = "v5e:8x8"
  return c
