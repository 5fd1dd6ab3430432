"""Every shipped config builds its full-size State and takes one real step, reduced."""

from __future__ import annotations

import copy
import functools
import gzip
import itertools
import json
import re

import jax
import numpy as np
import pytest
from helpers.marks import slow_unless
from helpers.shipped import ROOT, load
from helpers.small_shards import samples, write_tar
from helpers.small_stores import write_store

from bigalign import sharding, tree
from bigalign.config import resolve_config
from bigalign.inputs import open_data
from bigalign.options import plain
from bigalign.program import check_loss, init_on_mesh, layout, make_program, make_programs
from bigalign.stages import split
from bigalign.step import data_position, summary, train_step

NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
# Those that begin from checkpoints are run in test_init.py, with small ones, those that read stores
# in test_frozen.py.
SCRATCH = [
  x
  for x in NAMES
  if not re.search(r"\binit=|name=\"features\"", (ROOT / f"configs/{x}.py").read_text())
]

# Width, depth, batch, vocabulary, data, classes and depth of heads. All else is run as shipped.
REDUCED = re.compile(
  r"model/(image|text)/(width|depth)|model/text/vocab_size|model/embed_dim|(stages/0/)?batch_size"
  r"|data/tokenizer/(path|vocabulary)|data/source|loss/(silc|ibot)/(prototypes|hidden)"
  r"|loss/(caption|coca|caption_fused)/depth|data/teachers/\w+/(image|text|second)"
)


@pytest.mark.parametrize("name", NAMES)
def test_says_what_a_run_is(name):
  """Each names its length, checkpoints, logs and seed, and the command that runs it."""
  c = load(name)
  for key in ("total_steps", "checkpoint_every", "log_every", "seed"):
    assert isinstance(c[key], int), key
  docstring = (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1]
  assert re.search(rf"--config={name}\b", docstring) or f"make {name}" in docstring


@pytest.mark.parametrize("name", slow_unless(SCRATCH, ["siglip_b16", "tiny"].__contains__))
def test_full_size_state(name):
  """Shapes and places of the whole state on two meshes of eight; no array is made."""
  config = resolve_config(load(name))
  program = make_program(config, dataset_size=10_000)
  for sizes in (dict(data=8), dict(data=2, fsdp=4)):
    mesh = sharding.make_mesh(**sizes)
    shapes, shardings = layout(program, mesh)
    assert jax.tree.structure(shapes) == jax.tree.structure(shardings)
  for one in make_programs(config)[:-1]:
    summary(one, layout(one, mesh)[0])  # its batches fit its parameters
  if name.endswith("_b16") and name != "siglip2_b16":  # which has 256,000 tokens, and heads
    arrays = {**shapes.trainable, **shapes.frozen}
    count = sum(x.size for path, x in arrays.items() if path.startswith("model/"))
    # FLIP's text tower has BERT's vocabulary: 139.8 million.
    assert 139e6 < count < 210e6, f"{count / 1e6:.0f} million parameters"


def vocabulary(tokenizer, folder):
  """The tokenizer's options with a small vocabulary of the same kind in the file's place."""
  made = dict(tokenizer)
  if tokenizer["name"] == "sentencepiece":
    import sentencepiece

    texts = [f"picture number {i} of {'a' * (i % 5)} small set" for i in range(99)]
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(texts),
      model_prefix=str(folder / "small"),
      vocab_size=40,
      minloglevel=2,
    )
    made["path"] = str(folder / "small.model")
  elif tokenizer["name"] == "clip":
    from bigalign.data.text.clip_text import _byte_characters

    pairs = itertools.islice(itertools.product(_byte_characters(), repeat=2), 49_152 - 256 - 2)
    merges = ["#version: made for a test", *(" ".join(pair) for pair in pairs)]
    made["path"] = str(folder / "merges.txt.gz")
    with gzip.open(made["path"], "wt", encoding="utf-8") as file:
      file.write("\n".join(merges) + "\n")
  elif tokenizer["name"] == "wordpiece":
    made["path"] = str(folder / "vocab.txt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "picture", "number"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
  elif tokenizer.get("vocabulary", "glyphs") != "glyphs":
    made["vocabulary"] = str(folder / "words.txt")
    (folder / "words.txt").write_text("picture\nnumber\n")
  return made


def teacher_stores(teachers, folder):
  """The options of the teachers, with stores of random vectors of 12 samples in their place."""
  rng = np.random.default_rng(0)
  keys = [f"00000.tar/{i:06d}" for i in range(12)]

  def written(name, side, width):
    shape = (width,) if side == "image" else (1, width)
    rows = {key: rng.standard_normal(shape, np.float32) for key in keys}
    return write_store(folder / name / side, rows, dtype="bfloat16")

  return {
    name: teacher
    | {side: written(name, side, teacher["width"]) for side in teacher if side != "width"}
    for name, teacher in teachers.items()
  }


def reduced(c, folder):
  """The config with towers one layer deep, eight pairs, and data made here."""
  small = copy.deepcopy(c)
  for side in ("image", "text"):
    tower = small["model"][side]
    tower |= dict(width=8 * (tower.get("heads") or 12), depth=1)
    if small["model"].get(f"{side}_projector", {}).get("name") == "identity":
      small["model"]["embed_dim"] = tower["width"]
  for one in (small, *(x for x in small.get("stages", ()) if "batch_size" in x)):
    one["batch_size"] = 8
  if small["model"]["text"].get("vocab_size", 0) > 100_000:
    small["model"]["text"]["vocab_size"] = 300  # the vocabulary above has 40
  for head in small["loss"].keys() & {"silc", "ibot"}:
    small["loss"][head] |= dict(prototypes=64, hidden=64)
  for head in small["loss"].keys() & {"caption", "coca", "caption_fused"}:
    small["loss"][head] |= dict(depth=1)
  small["data"]["tokenizer"] = vocabulary(c["data"]["tokenizer"], folder)
  if c["data"]["source"] != "glyphs":
    members = samples(0, 12)
    if "locations" in c["data"]:
      region = dict(box=[0.1, 0.2, 0.8, 0.9], phrase="a picture")
      stored = json.dumps(dict(regions=[region])).encode()
      members += [(name.replace(".cls", ".json"), stored) for name, _ in members[2::3]]
    if "teachers" in c["data"]:
      (field,) = c["data"]["second_captions"]
      stored = json.dumps({field.removeprefix("json."): "a picture"}).encode()
      members += [(name.replace(".cls", ".json"), stored) for name, _ in members[2::3]]
      small["data"]["teachers"] = teacher_stores(c["data"]["teachers"], folder)
    small["data"]["source"] = write_tar(folder / "00000.tar", sorted(members))
  return small


def flat(c):
  """{path: value} of a config and its stages."""
  stages = {f"stages/{i}": tree.flatten(x) for i, x in enumerate(c.get("stages", ()))}
  rest = {k: x for k, x in c.items() if k != "stages"}
  return tree.flatten(plain(rest)) | tree.flatten(stages)


# (config, stage): the last stage of each, and first stages whose programs differ from it: in the
# patches that the tower sees (flip), in the image size (clipa), in views and losses (siglip2). Both
# stages of lit_unlocked_b16 are run in test_init.py.
STEPPED = [(name, -1) for name in SCRATCH] + [
  (name, 0) for name in ("flip_b16", "clipa_b16", "siglip2_b16")
]


@pytest.mark.slow
@pytest.mark.parametrize(
  "name,number", STEPPED, ids=[f"{x}-{y}" if y >= 0 else x for x, y in STEPPED]
)
def test_one_real_step(name, number, tmp_path):
  """Data, augmentation, tokenizer, towers, loss and optimizer as shipped, but for REDUCED."""
  c = load(name).to_dict()
  small = reduced(c, tmp_path)
  before, after = (flat(x) for x in (c, small))
  changed = {k for k in {*before, *after} if before.get(k) != after.get(k)}
  assert {k for k in changed if not REDUCED.fullmatch(k)} == set()

  # The number of worker processes has no influence on batches: test_pipeline.py.
  small["data"]["workers"] = 0
  config = resolve_config(small)
  stage = split(config)[number]
  inputs = open_data(stage.config.data)
  dataset_size = len(inputs.source)
  programs = make_programs(config, dataset_size=dataset_size)
  program = programs[number]
  check_loss(program, programs)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  rows = sharding.host_rows(mesh, 8)
  batches = inputs.batches(batch_size=8, rows=rows, seed=config.seed, rejected_log="")
  host_batch = next(batches)
  batches.close()
  assert {k: (x.shape, x.dtype) for k, x in host_batch.items()} == {
    k: (shape, np.dtype(dtype)) for k, (shape, dtype) in program.spec.items()
  }
  _, shardings = layout(program, mesh, config.rules)
  state = init_on_mesh(program, shardings)
  with jax.set_mesh(mesh):
    batch = sharding.global_batch(mesh, host_batch, rows, 8)
    after, metrics, watched = jax.jit(functools.partial(train_step, program=program))(
      state, batch, data_position(0, dataset_size)
    )
  assert watched.finite["loss"] and watched.finite["grad_norm"] and metrics["loss"] > 0
  still = [k for k, x in after.trainable.items() if np.array_equal(x, state.trainable[k])]
  # One batch does not reach every row of a bias behind a zero gradient, but most of them.
  assert len(still) < len(after.trainable) / 2, still
