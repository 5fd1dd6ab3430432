"""Training against open_clip's, step by step: python experiments/parity.py OUT

Needs open_clip (`make open-clip`). First, the same model, initial weights, batches in the same
order and AdamW with open_clip's decay and schedule, in float32: losses of --steps steps of
open_clip's PyTorch model and of ours, and their largest relative difference for each seed. Then
both on the same architecture, samples and steps: open_clip as it trains, ours with the same
optimizer and our first values, and ours with Muon; retrieval, pairs per second and seconds of CPU.
"""

from __future__ import annotations

import copy
import json
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import arms
import icons
import numpy as np

import bigalign
from bigalign.data.loader.options import resolve_data
from bigalign.data.sources.base import open_source
from bigalign.inputs import open_data
from bigalign.run.metrics import read_metrics
from bigalign.train import train

sys.path.append(str(pathlib.Path(__file__).parents[1] / "benchmarks"))
from rival import import_open_clip

LENGTH, SIZE = 16, 32
MODEL = dict(
  embed_dim=128,
  vision_cfg=dict(image_size=SIZE, layers=4, width=128, head_width=32, patch_size=8),
  text_cfg=dict(context_length=LENGTH, vocab_size=49_408, width=128, heads=4, layers=2),
)
# The same model with our first values.
OF_BOTH = dict(width=128, heads=4, activation="gelu", epsilon=1e-5, dtype="float32")
OURS: dict[str, Any] = dict(
  image=dict(name="vit", depth=4, patch=8, patch_bias=False, pool="cls", pre_norm=True, **OF_BOTH),
  text=dict(
    name="text", depth=2, vocab_size=49_408, length=LENGTH, causal=True, pool="eos", **OF_BOTH
  ),
  embed_dim=128,
  pixels="clip",
)
OURS["image"]["class_position"] = True
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LR, WARMUP, DECAY = 1e-3, 20, 0.2


def config(steps: int, batch: int) -> dict[str, Any]:
  """The data of icons.small with CLIP's tokenizer, and open_clip's AdamW."""
  c = icons.small(steps=steps, batch=batch)
  c["log_every"] = 1
  c["data"] |= dict(image_size=SIZE, tokenizer=dict(name="clip", length=LENGTH))
  c["data"]["tokenizer"]["path"] = "$BIGALIGN_DATA/tokenizers/clip_bpe_simple_vocab_16e6.txt.gz"
  c["optimizer"] = dict(
    name="adamw", lr=LR, b1=0.9, b2=0.98, eps=1e-6, weight_decay=DECAY, clip_norm=None
  )
  c["optimizer"] |= dict(schedule="cosine", warmup=WARMUP)
  c["optimizer"]["decay"] = r"/(kernel|embedding|positions|class_position)$"
  return c


def batches(c: dict[str, Any]) -> Iterator[dict[str, np.ndarray]]:
  """The batches of a run."""
  rows = np.arange(c["batch_size"])
  inputs = open_data(resolve_data(c["data"]))
  made = inputs.batches(batch_size=len(rows), rows=rows, seed=c["seed"], rejected_log="")
  try:
    yield from made
  finally:
    made.close()


def new_model(seed: int) -> Any:
  """open_clip's model with its own first values."""
  import open_clip
  import torch

  torch.manual_seed(seed)
  return open_clip.model.CLIP(**MODEL)


def save(model: Any, folder: pathlib.Path) -> str:
  """Writes a model of open_clip as a folder that `model.init` and `bigalign.load` read."""
  import safetensors.torch

  folder.mkdir(parents=True, exist_ok=True)
  weights = {name: x.contiguous() for name, x in model.state_dict().items()}
  safetensors.torch.save_file(weights, folder / "open_clip_model.safetensors")
  preprocess = dict(mean=MEAN, std=STD, interpolation="bicubic", resize_mode="squash")
  values = dict(model_cfg=MODEL, preprocess_cfg=preprocess)
  (folder / "open_clip_config.json").write_text(json.dumps(values))
  return str(folder)


def theirs(model: Any, c: dict[str, Any]) -> tuple[list[float], float]:
  """The losses of open_clip's training, and pairs per second of its steps after the first ten."""
  import open_clip
  import torch
  from open_clip_train.scheduler import cosine_lr

  named = [*model.named_parameters()]

  def no_decay(name: str, x: Any) -> bool:
    return x.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))

  groups = [
    dict(params=[x for name, x in named if no_decay(name, x)], weight_decay=0.0),
    dict(params=[x for name, x in named if not no_decay(name, x)], weight_decay=DECAY),
  ]
  optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), eps=1e-6)
  schedule = cosine_lr(optimizer, LR, WARMUP, c["total_steps"])
  loss_of = open_clip.ClipLoss()
  mean, std = (torch.tensor(x).reshape(1, 3, 1, 1) for x in (MEAN, STD))
  losses, begin = [], 0.0
  for step, batch in zip(range(c["total_steps"]), batches(c)):
    if step == 10:
      begin = time.perf_counter()
    schedule(step)
    pixels = torch.from_numpy(np.ascontiguousarray(batch["image"])).permute(0, 3, 1, 2) / 255
    text = torch.from_numpy(batch["text"].astype(np.int64))
    zimg, ztxt, scale = model((pixels - mean) / std, text)
    loss = loss_of(zimg, ztxt, scale)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
      model.logit_scale.clamp_(0, np.log(100))
    losses.append(loss.item())
  speed = (c["total_steps"] - 10) * c["batch_size"] / (time.perf_counter() - begin)
  return losses, speed


def retrieved(folder: pathlib.Path) -> dict[str, float]:
  """Text to image R@5 of a run or a folder of open_clip."""
  model = bigalign.load(folder)
  found = {}
  for name in icons.HELD_OUT:
    source = open_source(icons.SPLITS[name], captions=("txt",))
    samples = [source[i] for i in range(len(source))]
    zimg = model.embed_images([x["image"] for x in samples])
    ztxt = model.embed_texts([x["captions"][0] for x in samples])
    found[f"{name}, t2i R@5"] = float(icons.first(zimg, ztxt).mean())
  return found


def curves(out: pathlib.Path, seed: int, steps: int) -> float:
  """Trains both from the same weights; returns the largest relative difference of their losses.

  The losses of a seed that OUT has are not computed again.
  """
  file = out / f"curves-{seed}.npy"
  if file.exists():
    own, other = np.load(file)
    return float(np.abs(own / other - 1).max())
  c = config(steps, 128) | dict(seed=seed, evals={})
  model = new_model(seed)
  c["model"] = dict(init=save(model, out / f"start-{seed}"))
  for side in ("image", "text"):
    c["model"][side] = dict(dtype="float32")
  run = out / f"parity-{seed}"
  train(c, run)
  own = np.asarray([row["train/loss"] for row in read_metrics(run) if "train/loss" in row])
  other = np.asarray(theirs(model, c)[0])
  np.save(file, np.stack([own, other]))
  return float(np.abs(own / other - 1).max())


def best(out: pathlib.Path, seed: int, steps: int) -> list[arms.Row]:
  """A row of each way to train."""
  c = config(steps, 256) | dict(seed=seed, evals={}, log_every=50)
  begin = time.process_time()
  model = new_model(seed)
  speed = theirs(model, c)[1]
  figures = {"pairs/s": speed, "CPU s": time.process_time() - begin}
  folder = pathlib.Path(save(model, out / f"open_clip-{seed}"))
  rows = [dict(arm="open_clip", seed=seed, **retrieved(folder), **figures)]
  new = c | dict(model=copy.deepcopy(OURS))
  muon = copy.deepcopy(new)
  muon["optimizer"] = dict(name="muon", lr=2e-3, warmup=WARMUP, weight_decay=0.1)
  for arm, own in {"ours, AdamW": new, "ours, Muon": muon}.items():
    begin, run = time.process_time(), out / f"{arm.replace(', ', '-')}-{seed}"
    train(own, run)
    speeds = [row["train/samples_per_second"] for row in read_metrics(run) if "train/loss" in row]
    figures = {"pairs/s": float(np.median(speeds)), "CPU s": time.process_time() - begin}
    rows.append(dict(arm=arm, seed=seed, **retrieved(run), **figures))
  return rows


def main() -> None:
  """Compares the curves, then the results."""
  given = arms.arguments(__doc__ or "", steps=200, longer=400)
  import_open_clip()
  differences = [curves(given.out, seed, given.steps) for seed in given.seeds]
  print("largest relative differences of the losses:", *(f"{x:.1e}" for x in differences))
  file = given.out / arms.RESULTS
  rows: list[arms.Row] = json.loads(file.read_text()) if file.exists() else []
  for seed in given.seeds:
    if not any(row["seed"] == seed for row in rows):
      rows += best(given.out, seed, given.longer)
      file.write_text(json.dumps(rows, indent=1) + "\n")
  columns = [f"{name}, t2i R@5" for name in icons.HELD_OUT] + ["pairs/s", "CPU s"]
  arms.show(rows, columns, given.out)
  arms.draw(rows, columns, given.out / "parity.png")


if __name__ == "__main__":
  main()
