"""AltCLIP's two stages on small data: python experiments/altclip.py OUT --language de

  export BIGALIGN_DATA=…   # the folder that contains stamps, emoji, flickr8k, coco2k and weights
  export MINILM=…          # as configs/photos_frozen.py says

The teacher is configs/photos_frozen.py, trained on emoji and four fifths of the stamps too, with
English captions alone. Stage 1 has no images: a small text tower from scratch learns the teacher's
vectors of English sentences, from these sentences and from their translations. Stage 2 contrasts
the pictures of these stamps, whose tower stays frozen, with captions in both languages. Writes
OUT/altclip.json and prints retrieval among stamps by captions in both languages: of the pictures of
the teacher, and of held-out pictures with sentences that no stage saw; docs/samples.md has the
figures. A quarter of an hour on two cores; a second start continues.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import pathlib
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

import rich.box
import rich.table

from bigalign.frozen.embed import embed
from bigalign.run import tables
from bigalign.run.configs import load_config
from bigalign.run.metrics import read_metrics
from bigalign.train import train

PARTS = ("train", "val")
TOKENIZER = dict(
  name="clip", path="$BIGALIGN_DATA/tokenizers/clip_bpe_simple_vocab_16e6.txt.gz", length=48
)


def members(pattern: str) -> Iterator[dict[str, bytes]]:
  """The files of each sample of a tar, by their endings."""
  with tarfile.open(os.path.expandvars(pattern)) as tar:
    samples: dict[str, dict[str, bytes]] = {}
    for member in tar:
      key, _, ending = member.name.partition(".")
      samples.setdefault(key, {})[ending] = tar.extractfile(member).read()  # type: ignore[union-attr]
  yield from samples.values()


def write_stamps(out: pathlib.Path) -> None:
  """Writes OUT/train.tar and OUT/val.tar: a fifth of the captions are held out."""
  with tarfile.open(out / "train.tar", "w") as train_tar, tarfile.open(out / "val.tar", "w") as val:
    for i, files in enumerate(members("$BIGALIGN_DATA/stamps/00000.tar")):
      held_out = zlib.crc32(json.loads(files["json"])["caption"].encode()) % 5 == 0
      for ending, content in files.items():
        info = tarfile.TarInfo(f"{i:03d}.{ending}")
        info.size = len(content)
        (val if held_out else train_tar).addfile(info, io.BytesIO(content))


def write_sentences(out: pathlib.Path, language: str) -> int:
  """Writes OUT/sentences.jsonl, English and translated sentences of training data; their number."""
  sources = [f"{out}/train.tar"]
  sources += [f"$BIGALIGN_DATA/emoji/train/{i:05d}.tar" for i in range(3)]
  sources += [f"$BIGALIGN_DATA/flickr8k/train/{i:05d}.tar" for i in range(3)]
  rows = []
  for source in sources:
    for files in members(source):
      stored = json.loads(files["json"])
      texts = stored.get("names") or stored.get("multi30k_translated") or {}
      if {"en", language} <= texts.keys():
        rows.append(dict(en=texts["en"], other=texts[language]))
  (out / "sentences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return len(rows)


def teacher_config(out: pathlib.Path) -> dict[str, Any]:
  """configs/photos_frozen.py with drawings, at the resolution of MobileNetV2."""
  c: dict[str, Any] = load_config("photos_frozen").to_dict()
  c["data"]["image_size"] = 224
  c["data"]["mixture"] = (
    *c["data"]["mixture"],
    dict(name="emoji", source="$BIGALIGN_DATA/emoji/train/{00000..00002}.tar"),
    dict(name="stamps", source=f"{out}/train.tar"),
  )
  return c


def retrieval(out: pathlib.Path, language: str) -> dict[str, Any]:
  """Retrieval of the pictures of both parts, in English and in the other language."""
  return {
    f"{part}_{name}": dict(
      type="retrieval", source=f"{out}/{part}.tar", fields=(f"json.names.{name}",), captions=1
    )
    for part in PARTS
    for name in ("en", language)
  }


def student_config(out: pathlib.Path, language: str, steps: int) -> dict[str, Any]:
  """Stage 1: the towers of the teacher, but a text tower from scratch; texts alone."""
  c = teacher_config(out)
  c |= dict(total_steps=steps, batch_size=128, frozen="", evals=retrieval(out, language))
  store = f"{out}/english/text"
  c["data"] = dict(
    source=f"{out}/sentences.jsonl",
    images=False,
    captions=(("en", 1.0), ("other", 2.0)),
    teachers=dict(english=dict(text=dict(en=store, other=store))),
    image_size=224,
    resize="squash",
    tokenizer=TOKENIZER,
  )
  c["model"] = dict(
    init=f"{out}/teacher",
    parts="image_",
    text=dict(
      name="bert",
      vocab_size=49_408,
      length=48,
      width=192,
      depth=2,
      heads=4,
      mlp_ratio=4.0,
      pool="mean",
      pad=0,
      scan=False,
      dropout=0.2,
    ),
    text_projector=dict(name="linear"),
  )
  c["loss"] = dict(feature_distill=dict(kind="cosine", w_img=0.0))
  c["optimizer"] = dict(name="adamw", lr=1e-3, warmup="5%", weight_decay=0.1)
  return c


def second_config(out: pathlib.Path, language: str, steps: int) -> dict[str, Any]:
  """Stage 2: the run of stage 1 on pictures of stamps with captions in both languages."""
  c = copy.deepcopy(student_config(out, language, steps))
  c["frozen"] = "image_"
  c["data"] = dict(
    source=f"{out}/train.tar",
    captions=(("json.names.en", 1.0), (f"json.names.{language}", 1.0)),
    stores=dict(image=f"{out}/stamps/image"),
    image_size=224,
    resize="squash",
    tokenizer=TOKENIZER,
  )
  c["model"] = dict(init=f"{out}/stage1")
  c["loss"] = dict(clip=dict(weight=1.0))
  c["optimizer"]["lr"] = 1e-4
  return c


def scores(run: pathlib.Path) -> dict[str, float]:
  """The last evaluation of a run."""
  last: dict[str, float] = {}
  for row in read_metrics(run):
    last |= {k: x for k, x in row.items() if k.endswith(("_R@1", "_R@5", "_mean_rank"))}
    last |= {k: x for k, x in row.items() if k.endswith("num_samples")}
  return last


def main() -> None:
  """The program."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("out", type=pathlib.Path)
  parser.add_argument("--language", default="de")
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--second_steps", type=int, default=100)
  args = parser.parse_args()
  out, language = args.out, args.language
  out.mkdir(parents=True, exist_ok=True)
  write_stamps(out)
  found: dict[str, Any] = {"sentences": write_sentences(out, language)}

  teacher = teacher_config(out)
  stores = embed(teacher, out / "stores")
  taught = copy.deepcopy(teacher)
  taught["data"]["stores"] = {side: str(folder) for side, folder in stores.items()}
  taught["evals"] = {k: x for k, x in retrieval(out, language).items() if k.endswith("_en")}
  train(taught, out / "teacher")
  english = copy.deepcopy(teacher)
  english["model"] = dict(init=f"{out}/teacher")
  english["data"] |= dict(
    mixture=(), source=f"{out}/sentences.jsonl", captions=("en",), images=False
  )
  embed(english, out / "english", sides=("text",), projected=True)
  stamps = copy.deepcopy(english)
  stamps["data"] |= dict(source=f"{out}/train.tar", captions=("json.names.en",), images=True)
  embed(stamps, out / "stamps", sides=("image",))

  train(student_config(out, language, args.steps), out / "stage1")
  train(second_config(out, language, args.second_steps), out / "stage2")
  found |= {name: scores(out / name) for name in ("teacher", "stage1", "stage2")}
  (out / "altclip.json").write_text(json.dumps(found, indent=1))
  sets = [f"{part}_{name}" for part in PARTS for name in ("en", language)]
  table = rich.table.Table("text to image R@5", *sets, box=rich.box.SIMPLE_HEAD)
  for name in ("teacher", "stage1", "stage2"):
    row = [found[name].get(f"val/{x}/text_to_image_R@5") for x in sets]
    table.add_row(name, *("" if x is None else f"{x:.3f}" for x in row))
  sizes = [found["stage1"][f"val/{x}/num_samples"] for x in sets]
  table.add_row("chance", *(f"{5 / n:.3f}" for n in sizes))
  tables.show(table)


if __name__ == "__main__":
  main()
