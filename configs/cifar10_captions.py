"""From scratch on 5,000 captioned CIFAR-10 photos, zero-shot on 1,000 others; minutes on a laptop.

  export BIGALIGN_DATA=…   # the folder that contains cifar10/{train,test}
  bigalign train --config=cifar10_captions

The captions are class names, so the vocabulary is the ten names, and the other words of a zero-shot
template are dropped: they never occur in training, and keeping them costs four points.
"""

from ml_collections import ConfigDict


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.total_steps = 1_000
  c.batch_size = 128
  c.log_every = 20
  c.checkpoint_every = 500
  c.eval_every = 250

  c.data = dict(
    source="$BIGALIGN_DATA/cifar10/train/{0..4}.tar",
    image_size=32,
    tokenizer=dict(
      name="words", vocabulary="$BIGALIGN_DATA/cifar10/classnames.txt", drop_unknown=True, length=4
    ),
    augment=dict(crop="random_resized", scale=(0.5, 1.0), flip=0.5),
    workers=1,
  )
  c.model = dict(
    image=dict(
      name="vit",
      patch=8,
      width=128,
      depth=4,
      heads=4,
      mlp_ratio=2.0,
      stem="conv",
      pool="mean",
      scan=False,
      dtype="float32",
      dropout=0.1,
    ),
    text=dict(
      name="text",
      vocab_size=13,
      length=4,
      width=128,
      depth=1,
      heads=4,
      mlp_ratio=2.0,
      pool="mean",
      scan=False,
      dtype="float32",
    ),
    embed_dim=128,
  )
  c.loss = dict(clip=dict(weight=1.0))
  c.optimizer = dict(name="muon", lr=2e-3, warmup="5%", weight_decay=0.1)
  c.evals = dict(
    cifar10=dict(
      type="zeroshot",
      source="$BIGALIGN_DATA/cifar10/test/0.tar",
      templates="$BIGALIGN_DATA/cifar10/zeroshot_classification_templates.txt",
      classnames="$BIGALIGN_DATA/cifar10/classnames.txt",
    ),
  )
  c.topology = "v5e:1x1"
  return c
