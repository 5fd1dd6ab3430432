"""Folders of runs with parameters of random numbers: nothing is trained or compiled."""

from __future__ import annotations

import jax
import numpy as np
from helpers.shipped import load

from bigalign import evaluate
from bigalign.checkpoint import Checkpoints
from bigalign.config import resolve_config
from bigalign.merge import members
from bigalign.options import plain
from bigalign.program import make_embed, make_program
from bigalign.run.provenance import read_config, write_config
from bigalign.sharding import make_mesh


def small(**changes):
  """configs/tiny.py with towers one layer deep, in plain values."""
  c = load("tiny").to_dict()
  c |= dict(evals={}, ema=0.0, writer=dict(tensorboard=False), loss=dict(clip={}), batch_size=16)
  for side in ("image", "text"):
    c["model"][side] |= dict(width=16, depth=2, heads=2, dtype="float32", scan=False)
  return c | changes


def random_params(values, seed=0):
  """{path: float32 array} of the parameters of a config."""
  rng = np.random.default_rng(seed)
  shapes = make_program(resolve_config(values), dataset_size=100).params
  return {k: np.asarray(rng.normal(size=x.shape), np.float32) for k, x in shapes.items()}


def write(folder, values, arrays, step=3):
  """The folder of a run with these parameters at one step; returns its address."""
  config = resolve_config(values)
  embed = make_embed(make_program(config, dataset_size=100).model)
  meta = dict(dataset_size=100, samples_seen=48, data="", config=plain(config))
  run = evaluate.Run(folder, step, config, meta, make_mesh(), {}, {}, embed)
  members.write(folder, run, arrays, {})
  return str(folder)


def add(folder, step, arrays, ema=(), fixed=()):
  """A later checkpoint; `ema` averages of its parameters, `fixed` the frozen ones of the run."""
  meta = read_config(folder)
  meta["config"]["ema"] = 0.5 if ema else 0.0
  trainable = {k: jax.numpy.asarray(x) for k, x in arrays.items() if k not in fixed}
  with Checkpoints(folder, last=9) as checkpoints:
    checkpoints.save(step, dict(trainable=trainable, ema=dict(ema)), meta, {})
    checkpoints.save_frozen({k: jax.numpy.asarray(arrays[k]) for k in fixed})
  write_config(folder, {k: x for k, x in meta.items() if k != "checksum"})
