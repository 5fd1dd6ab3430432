"""From scratch on 3,400 captioned photos and emoji; retrieval on their held-out shards.

  export BIGALIGN_DATA=…   # the folder that contains coco2k, flickr8k and emoji
  bigalign train --config=photos

Three thousand photos are too few for a good CLIP. This config shows every part of a run on real
shards, with several captions per image. docs/configs.md has its results.
"""

from ml_collections import ConfigDict

CAPTIONS = ("json.captions", "txt")


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.total_steps = 1_000
  c.batch_size = 128
  c.log_every = 20
  c.checkpoint_every = 500
  c.eval_every = 250

  c.data = dict(
    source="$BIGALIGN_DATA/coco2k/train/{00000..00005}.tar"
    "::$BIGALIGN_DATA/flickr8k/train/{00000..00002}.tar"
    "::$BIGALIGN_DATA/emoji/train/{00000..00002}.tar",
    captions=CAPTIONS,
    image_size=64,
    tokenizer=dict(
      name="wordpiece", path="$BIGALIGN_DATA/tokenizers/bert_base_uncased_vocab.txt", length=24
    ),
    augment=dict(crop="random_resized", scale=(0.5, 1.0), flip=0.5),
    resize="shortest",
    workers=2,
  )
  c.model = dict(
    image=dict(
      name="vit",
      patch=16,
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
      vocab_size=30_522,
      length=24,
      width=128,
      depth=1,
      heads=4,
      mlp_ratio=2.0,
      pool="mean",
      scan=False,
      dtype="float32",
      dropout=0.1,
    ),
    embed_dim=128,
  )
  c.loss = dict(siglip=dict(weight=1.0, positives="ids"))
  c.optimizer = dict(name="muon", lr=2e-3, warmup="5%", weight_decay=0.1)
  c.evals = dict(
    coco2k=dict(
      type="retrieval", source="$BIGALIGN_DATA/coco2k/val/00000.tar", fields=CAPTIONS, captions=5
    ),
    flickr8k=dict(
      type="retrieval", source="$BIGALIGN_DATA/flickr8k/val/00000.tar", fields=CAPTIONS, captions=5
    ),
    emoji=dict(
      type="retrieval", source="$BIGALIGN_DATA/emoji/val/00000.tar", fields=CAPTIONS, captions=5
    ),
  )
  c.topology = "v5e:1x1"
  return c
