"""Two or three commands of each program, which end its --help."""

from __future__ import annotations

EXAMPLES = {
  "train": (
    "bigalign train --config=quickstart",
    "bigalign train --config=siglip_b16 --workdir=runs/siglip --config.batch_size=4096"
    " --config.data.source='/data/{00000..41455}.tar'",
  ),
  "evaluate": (
    "bigalign evaluate runs/quickstart",
    "bigalign evaluate runs/siglip --step best --zeroshot /data/cifar10 --json scores.json",
  ),
  "embed": (
    "bigalign embed --config=photos_frozen --out=stores/photos",
    "bigalign embed --config=mine.py --out=stores/mine --towers=image --batch_size=512",
  ),
  "reinforce": (
    "bigalign reinforce --config=teacher.py --views=10 --out=stores/a",
    "bigalign reinforce --config=teacher.py --views=4 --towers=image --out=stores/b",
  ),
  "compare": (
    "bigalign compare --image stores/dino/image --text stores/minilm/text",
    "bigalign compare --image A/image B/image --text C/text D/text --heatmap towers.png",
  ),
  "curate": (
    "bigalign curate --classes classes/image --captions captions/text --out chosen",
    "bigalign curate --classes classes/image --captions captions/text --shots 16 --out chosen",
  ),
  "dedup": (
    "bigalign dedup stores/photos/image --out unique",
    "bigalign dedup stores/photos/image --eps 0.02 --clusters 1000 --out unique",
  ),
  "report": (
    "bigalign report runs/quickstart",
    "bigalign report runs/siglip --step best",
  ),
  "export": (
    "bigalign export runs/siglip --format=hf --out=exports/siglip",
    "bigalign export --check exports/siglip",
  ),
  "merge": (
    "bigalign merge runs/base runs/tuned --alpha=0.5 --out=runs/merged",
    "bigalign merge runs/base runs/tuned --alphas=0,0.1,...,1 --json alphas.json",
    "bigalign merge --soup runs/a runs/b --greedy --metric=val/text_to_image_R@5 --out=runs/soup",
  ),
  "inspect": (
    "bigalign inspect '/data/{00000..41455}.tar'",
    "bigalign inspect /data/pairs.parquet --out pairs.html --batch_size=16384",
  ),
  "index": (
    "bigalign index '/data/{00000..41455}.tar'",
    "bigalign index '/data/*.tar' --stats --captions txt,json.caption",
  ),
  "convert": (
    "bigalign convert '/data/{00000..41455}.tar' --out /data/records",
    "bigalign convert '/data/*.tar' --out /data/small --short_side 256",
  ),
  "view": (
    "bigalign view '/data/*.tar' --where 'width >= 200' --out good",
    "bigalign view '/data/*.tar' --columns score=cosine --where 'score > 0.2' --out good",
    "bigalign view '/data/*.tar' --ids chosen.0.places.npy --out chosen",
  ),
  "score": (
    "bigalign score runs/clip '/data/*.tar' --out cosine",
    "bigalign score runs/clip '/data/*.tar' --what loss --step 10000 --out losses",
    "bigalign score runs/clip '/data/*.tar' --what learnability --teacher runs/big --out learn",
  ),
  "noise": (
    "bigalign noise losses --out noise",
    "bigalign noise runs/clip/losses --out runs/clip/noise",
  ),
  "balance": (
    "bigalign balance '/data/*.tar' --entries concepts.txt --out keep",
    "bigalign balance '/data/*.tar' --entries concepts.txt --tail 0.06 --out keep",
  ),
  "search": (
    "bigalign search runs/photos 'val/*.tar' --query 'a red bus'",
    "bigalign search runs/photos 'val/*.tar' --serve",
    "bigalign search runs/photos stores/photos --source 'val/*.tar' --image cat.jpg --json",
  ),
  "plan": (
    "bigalign plan --config=siglip_b16",
    "bigalign plan --config=siglip_b16 --topology=v5e:16x16 --batch=131072 --sweep=remat",
  ),
  "benchmark": (
    "bigalign benchmark --json=mine.json",
    "bigalign benchmark --config=siglip_b16 --batch=512 --config.model.image.remat=full",
  ),
  "costs": (
    "bigalign costs --losses=siglip,clip",
    "bigalign costs --losses=siglip --topology=v5e:16x16 --batch=131072",
  ),
  "configs": (
    "bigalign configs",
    "bigalign configs siglip_b16 --copy mine.py",
  ),
  "options": (
    "bigalign options data.augment",
    "bigalign options loss.siglip",
  ),
}


# What else the help of a program says.
NOTES = {
  "evaluate": "The evaluators of a run are those of its config; `bigalign options evals` explains"
  " them\nand their options.",
  "costs": "`bigalign options loss` explains the losses, `bigalign options logits` the ways.",
}


def text(program: str) -> str:
  """The examples of a program and its note, as lines that end its help; "" if it has none."""
  lines = [f"  {example}" for example in EXAMPLES.get(program, ())]
  notes = ["", NOTES[program]] if program in NOTES else []
  return "\n".join(["examples:", *lines, *notes]) if lines else ""
