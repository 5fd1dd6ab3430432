"""Times training of projectors from stores, with towers, in PyTorch: python benchmarks/frozen.py

Runs configs/photos_frozen.py (needs BIGALIGN_DATA and MINILM) in three ways: from embedding stores;
with the towers in every step, which encode each batch; and the same projectors, loss and update in
eager PyTorch, from tensors in memory. The three alternate, and the median turn counts. Exits with 1
if stores are not RATIO times as fast as encoding, or if they are slower than GUARD times PyTorch.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np
from step import made_by

from bigalign.data.loader.pairs import Pairs
from bigalign.frozen.embed import embed
from bigalign.run import runtime
from bigalign.run.metrics import read_metrics
from bigalign.train import train

RATIO, GUARD = 10.0, 0.7
ROOT = pathlib.Path(__file__).parents[1]
STEPS = dict(stores=120, encoding=6, torch=120)  # per turn; the first third is warm-up


def shipped() -> dict[str, Any]:
  """Returns configs/photos_frozen.py without its evaluators."""
  path = ROOT / "configs/photos_frozen.py"
  spec = importlib.util.spec_from_file_location("photos_frozen", path)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config: dict[str, Any] = module.get_config().to_dict()
  return config | dict(evals={}, checkpoint_every=0, writer=dict(tensorboard=False))


def ours(config: dict[str, Any], name: str, stores: dict[str, str], folder: str) -> float:
  """Returns the pairs per second of `bigalign train`, after its first third."""
  config, steps = copy.deepcopy(config), STEPS[name]
  config |= dict(total_steps=steps, log_every=steps // 3)
  config["data"]["stores"] = stores
  train(config, folder)
  rows = [row for row in read_metrics(folder) if "train/samples_per_second" in row]
  return statistics.median(row["train/samples_per_second"] for row in rows[1:])


def theirs(config: dict[str, Any], stores: dict[str, str]) -> float:
  """Returns the pairs per second of the same projectors in PyTorch, after the first third."""
  import torch
  from torch import nn

  class Residual(nn.Module):
    def __init__(self, width: int, dim: int, hidden: int, dropout: float, hidden_dropout: float):
      super().__init__()
      self.norm = nn.Sequential(nn.LayerNorm(width), nn.Dropout(dropout))
      self.mlp = nn.Sequential(
        nn.Linear(width, hidden), nn.GELU(), nn.Dropout(hidden_dropout), nn.Linear(hidden, dim)
      )
      self.skip = nn.Linear(width, dim)

    def forward(self, x: Any) -> Any:
      x = self.norm(x)
      return nn.functional.normalize(self.skip(x) + self.mlp(x), dim=-1)

  torch.manual_seed(0)
  pairs, model = Pairs(**stores), config["model"]
  rows = np.arange(len(pairs.image))
  image = torch.from_numpy(pairs.image.read(rows).astype(np.float32))
  first, count = pairs.text.find(pairs.image.samples(rows)[:, 0])
  text = torch.from_numpy(pairs.text.read(np.arange(len(pairs.text))).astype(np.float32))

  def projector(side: str, width: int) -> Residual:
    options = {k: v for k, v in model[f"{side}_projector"].items() if k != "name"}
    return Residual(width, model["embed_dim"], **options)

  towers = nn.ModuleList([projector("image", image.shape[1]), projector("text", text.shape[1])])
  scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))
  optimizer = torch.optim.AdamW(
    [*towers.parameters(), scale],
    lr=config["optimizer"]["lr"],
    weight_decay=config["optimizer"]["weight_decay"],
  )
  random, batch, begin = np.random.default_rng(0), config["batch_size"], 0.0
  target = torch.arange(batch)
  for step in range(STEPS["torch"]):
    if step == STEPS["torch"] // 3:
      begin = time.perf_counter()
    chosen = random.choice(len(image), batch, replace=False)
    caption = first[chosen] + random.integers(0, count[chosen])
    zimg, ztxt = towers[0](image[chosen]), towers[1](text[caption])
    logits = scale.exp() * zimg @ ztxt.T
    cross = nn.functional.cross_entropy
    loss = (cross(logits, target) + cross(logits.T, target)) / 2
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([*towers.parameters(), scale], 1.0)
    optimizer.step()
  steps = STEPS["torch"] - STEPS["torch"] // 3
  return steps * batch / (time.perf_counter() - begin)


def main() -> int:
  """Prints a table, writes the JSON, and returns 1 if a target is missed, otherwise 0."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=3, help="turns of each way; the median counts")
  parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("benchmarks/frozen.json"))
  args = parser.parse_args()
  config, versions = shipped(), runtime.versions()
  names = list(STEPS)
  if importlib.util.find_spec("torch"):
    versions["torch"] = importlib.metadata.version("torch")
  else:
    print("bigalign alone: torch is not installed; `make bench` installs it")
    names.remove("torch")
  rates_by_turn: dict[str, list[float]] = {name: [] for name in names}
  with tempfile.TemporaryDirectory() as folder:
    begin = time.perf_counter()
    stores = {k: str(v) for k, v in embed(config, f"{folder}/stores").items()}
    embed_seconds = time.perf_counter() - begin
    for turn in range(args.rounds):
      for name in names:
        where = stores if name == "stores" else {}
        rate = (
          theirs(config, stores)
          if name == "torch"
          else ours(config, name, where, f"{folder}/{name}{turn}")
        )
        rates_by_turn[name].append(rate)
  rates = {name: statistics.median(x) for name, x in rates_by_turn.items()}
  for name, rate in rates.items():
    print(f"{name:<10} {rate:8.0f} pairs/s")
  print(f"embedding took {embed_seconds:.0f} s, once")
  ratios = {f"stores / {name}": rates["stores"] / rates[name] for name in names[1:]}
  print(", ".join(f"{name}: {x:.2f}x" for name, x in ratios.items()))
  targets = {"stores / encoding": RATIO, "stores / torch": GUARD}
  missed = [name for name, x in ratios.items() if x < targets[name]]
  for name in missed:
    print(f"{name} is below the target of {targets[name]}x")
  result = dict(
    **made_by(versions),
    batch_size=config["batch_size"],
    pairs_per_second=rates,
    turns=rates_by_turn,
    embed_seconds=embed_seconds,
    ratio=ratios,
  )
  args.json.parent.mkdir(parents=True, exist_ok=True)
  args.json.write_text(json.dumps(result, indent=1) + "\n")
  return int(bool(missed))


if __name__ == "__main__":
  sys.exit(main())
