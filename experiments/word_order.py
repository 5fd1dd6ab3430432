"""Word order by hard negatives: python experiments/word_order.py OUT

Tunes a trained pair of towers with captions alone, and with captions whose words are swapped as
hard negatives, as NegCLIP (https://arxiv.org/abs/2210.01936) tunes CLIP. The pair is the teacher of
experiments/captions.py, whose OUT --captions names (OUT/../captions by default): a frozen
MobileNetV2, and MiniLM with a projector, which are tuned. The test of word order is the one of that
script.
"""

from __future__ import annotations

import pathlib
from typing import Any

import arms
from captions import COLUMNS, SETS, figures, stored, word_order

from bigalign.run.configs import load_config


def tuned(run: pathlib.Path, stores: dict[str, pathlib.Path], steps: int, lr: float) -> Any:
  """The text tower and the projectors of a run, with stored images."""
  c: dict[str, Any] = load_config("photos_frozen").to_dict()
  c |= dict(total_steps=steps, batch_size=64, frozen="image_tower/", model=dict(init=str(run)))
  c["data"]["stores"] = dict(image=str(stores["train"]))
  c["data"]["tokenizer"]["length"] = 24
  c["optimizer"] = dict(name="adamw", lr=lr, schedule="cosine", warmup="10%", weight_decay=0.1)
  for name in SETS:
    c["evals"][name] |= dict(image_store=str(stores[name]))
  return c


def ways(c: dict[str, Any]) -> dict[str, dict[str, Any]]:
  """Without and with swapped words, and with `hardneg_own` beside them."""
  swapped = c["data"] | dict(texts=dict(count=1, negatives=dict(count=1, rule="swap")))
  against = dict(negclip=dict(weight=1.0), hardneg_own=dict(weight=0.3))
  return dict(
    clip=c,
    negclip=c | dict(data=swapped, loss=dict(negclip=dict(weight=1.0))),
    against=c | dict(data=swapped, loss=against),
  )


def main() -> None:
  """Tunes all arms with all seeds."""
  given = arms.arguments(__doc__ or "", steps=80, lr=1e-4, captions="")
  captions = pathlib.Path(given.captions or given.out.parent / "captions")
  stores = stored(captions)
  before = word_order(captions / "teacher", stores["coco2k"])
  print(f"word order before: {before:.3f}")
  compared = ways(tuned(captions / "teacher", stores, given.steps, given.lr))
  rows = arms.compare(given.out, compared, given.seeds, figures(stores["coco2k"]))
  arms.show(rows, COLUMNS, given.out)
  arms.draw(rows, COLUMNS, given.out / "word_order.png")


if __name__ == "__main__":
  main()
