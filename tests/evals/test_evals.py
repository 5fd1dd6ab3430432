"""Evaluation over the mesh equals ten lines of numpy, whatever divides what."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from helpers.marks import slow_unless
from helpers.small_shards import picture, write_tar
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image
from sklearn.metrics import f1_score

from bigalign import sharding
from bigalign.data.loader.options import resolve_data
from bigalign.data.sources.base import open_source
from bigalign.evals import EVALS, embed, make_evaluators, retrieval, zeroshot
from bigalign.evals.embed import Context, Embedded
from bigalign.evals.retrieval import ranks
from bigalign.evals.zeroshot import PROMPTS, fill, read_templates
from bigalign.losses.logit_head import LogitHead
from bigalign.towers.padding import all_positions

SIZE, LENGTH, E = 4, 12, 8
DATA = resolve_data(dict(image_size=SIZE, tokenizer=dict(name="byte", length=LENGTH)))


class Tiny:
  """Random pixels and words; sample 3 does not decode, sample 5 has no caption."""

  fingerprint = "0"
  classnames = ("ant", "bee", "cat", "dog", "eel", "fox")

  def __init__(self, *, n=37, captions=3, seed=0, broken=(3,), silent=(5,)):
    rng = np.random.default_rng(seed)
    self.images = rng.integers(0, 256, (n, SIZE, SIZE, 3), np.uint8)
    words = ["".join(rng.choice([*"abcdefgh"], 6)) for _ in range(n * captions)]
    self.captions = [
      () if i in silent else tuple(words[i * captions :][: 1 + i % captions]) for i in range(n)
    ]
    self.labels = rng.integers(0, len(self.classnames) - 1, n)
    self.broken, self.silent = broken, silent

  def __len__(self):
    return len(self.images)

  def __getitem__(self, i):
    file = io.BytesIO()
    Image.fromarray(self.images[i]).save(file, "png")
    return dict(
      image=b"no image" if i in self.broken else file.getvalue(),
      captions=self.captions[i],
      key=f"{i:05}",
      label=int(self.labels[i]),
    )


def make_params(seed=0):
  rng = np.random.default_rng(seed)
  return dict(
    image=rng.normal(size=(SIZE * SIZE * 3, E)).astype(np.float32),
    text=rng.normal(size=(259, E)).astype(np.float32),
  )


def image_features(params, image):
  return (image.reshape(len(image), -1) / np.float32(255) - np.float32(0.5)) @ params["image"]


def text_features(params, ids, mask):
  place = 1 + jnp.arange(ids.shape[1]) / 10  # else anagrams tie, but for the last bit
  return jnp.einsum("ble,bl->be", jnp.asarray(params["text"])[ids], mask * place[None])


def unit(z):
  return z / jnp.linalg.norm(z, axis=-1, keepdims=True)


@jax.jit
def embed_image(params, image):
  return unit(image_features(params, image))


@jax.jit
def embed_text(params, ids, mask):
  return unit(text_features(params, ids, mask))


@jax.jit
def embed_image_coarsely(params, image):
  return jnp.sign(jnp.round(image_features(params, image)))


@jax.jit
def embed_text_coarsely(params, ids, mask):
  return jnp.sign(jnp.round(text_features(params, ids, mask) / 3))


@pytest.fixture
def tiny(monkeypatch):
  source = Tiny()
  monkeypatch.setattr(embed, "open_source", lambda spec, captions=None, frames=False: source)
  return source


@jax.jit
def embed_patches(params, image):
  """[B, 4, E], of four squares."""
  squares = rearrange(image, "b (h p) (w q) c -> b (h w) (p q c)", p=SIZE // 2, q=SIZE // 2)
  return unit((squares / np.float32(255) - np.float32(0.5)) @ params["image"][: squares.shape[-1]])


def make(name, options, *, towers=(embed_image, embed_text), logit_head=None, **axes):
  evaluators = make_evaluators(
    {name: options},
    embed_image=towers[0],
    embed_text=towers[1],
    mesh=sharding.make_mesh(**axes),
    data=DATA,
    logit_head=logit_head,
    embed_patches=embed_patches,
  )
  return evaluators[name]


def on_host(source, params, towers=(embed_image, embed_text)):
  """Embeddings of the usable samples, one device, one batch: zimg, ztxt, owner of each text."""
  usable = [i for i in range(len(source)) if i not in (*source.broken, *source.silent)]
  zimg = np.asarray(towers[0](params, source.images[usable]))
  texts = [(k, c) for k, i in enumerate(usable) for c in source.captions[i]]
  ids, mask = tokenise([c for _, c in texts])
  return zimg, np.asarray(towers[1](params, ids, mask)), np.asarray([k for k, _ in texts])


def tokenise(texts):
  return DATA.make_tokenizer().encode_batch(texts)


def numpy_retrieval(zimg, ztxt, owner):
  sims = zimg @ ztxt.T
  order = np.argsort(-sims, axis=1, kind="stable")
  to_text = np.argmax(owner[order] == np.arange(len(zimg))[:, None], axis=1)
  order = np.argsort(-sims.T, axis=1, kind="stable")
  to_image = np.argmax(order == owner[:, None], axis=1)
  out = {}
  for way, rank in (("image_to_text", to_text), ("text_to_image", to_image)):
    out |= {f"{way}_R@{k}": (rank < k).mean() for k in (1, 5, 10)}
    out |= {f"{way}_mean_rank": rank.mean() + 1}
    out |= {f"{way}_median_rank": np.floor(np.median(rank)) + 1}
  return {f"val/{name}": value for name, value in out.items()}


@pytest.mark.parametrize("axes", [dict(), dict(data=2, fsdp=2, tensor=2)])
@pytest.mark.parametrize(
  "towers",
  [(embed_image, embed_text), (embed_image_coarsely, embed_text_coarsely)],
  ids=["distinct", "ties"],
)
@pytest.mark.parametrize("batch_size", slow_unless([10, 100], (10).__eq__))
def test_retrieval_equals_numpy(tiny, axes, towers, batch_size):
  # 37 samples, 35 usable, divide neither by the batch (16 or 104 on 8 devices) nor by 8.
  options = dict(type="retrieval", source="tiny", captions=3, batch_size=batch_size)
  found = make("val", options, towers=towers, **axes)(make_params())
  zimg, ztxt, owner = on_host(tiny, make_params(), towers)
  expected = numpy_retrieval(zimg, ztxt, owner)
  expected |= {"val/num_samples": 35, "val/num_captions": len(ztxt), "val/rejected": 2}
  assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("axes", [dict(), dict(devices=jax.devices()[:1])])
def test_retrieval_in_small_chunks_is_the_same(tiny, monkeypatch, axes):
  options = dict(type="retrieval", source="tiny", captions=3, batch_size=16, map_at_r=True)
  whole = make("val", options, **axes)(make_params())
  monkeypatch.setattr(retrieval, "CHUNK", 5 * 48 * 3)  # 16 queries, 4 at a time
  monkeypatch.setattr(retrieval, "ROWS", 3)
  assert make("val", options, **axes)(make_params()) == whole


def test_each_accelerator_has_room_for_a_chunk():
  def mesh(platform):
    devices = np.array([types.SimpleNamespace(platform=platform)] * 16)
    return types.SimpleNamespace(devices=devices, shape=dict(data=4, fsdp=2, tensor=2))

  million = 10**6
  assert retrieval.at_once(256, million) == retrieval.at_once(256, million, mesh("cpu")) == 67
  assert retrieval.at_once(5 * 256, million, mesh("tpu")) == 8 * 2**26 // million == 536
  assert retrieval.at_once(256, million, mesh("gpu")) == 256  # all of them
  assert retrieval.at_once(256, 10**9) == 1


def test_retrieval_moves_queries_but_not_the_gallery(tiny):
  mesh = sharding.make_mesh(data=4, fsdp=2)
  split, replicated = (
    NamedSharding(mesh, P(None, sharding.BATCH)),
    sharding.replicated_sharding(mesh),
  )

  def shape(*sizes, dtype=jnp.float32, place=split):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

  batches, size, captions = 16, 64, 5
  z = Embedded(
    zimg=shape(batches, size, E),
    ztxt=shape(batches, size, captions, E),
    label=shape(batches, size, dtype=jnp.int32),
    ordinal=shape(batches, size, dtype=jnp.int32),
    valid=shape(batches, size, dtype=bool),
    texts_valid=shape(batches, size, captions, dtype=bool),
    rejects=shape(7, dtype=jnp.int32, place=replicated),
  )
  find = jax.jit(retrieval.both_directions, static_argnames="mesh", out_shardings=replicated)
  text = find.lower(z, mesh=mesh).compile().as_text()
  moved = re.findall(r"= (.*) (?:all-[-a-z]+|collective-permute)\(", text)
  sizes = [
    sum(
      math.prod(int(n) for n in dims.split(",") if n)
      for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)
    )
    for shapes in moved
  ]
  # A batch of queries, the ranks that come out; never gallery x E nor queries x gallery.
  assert sizes and max(sizes) <= batches * size * captions


def real_tokens(ids, mask):
  return mask.sum(1)


def context_of(*, embed_image=embed_image, embed_text=embed_text, **options):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return Context("val", embed_image, embed_text, mesh, DATA, **options)


def test_texts_are_cut_where_the_tower_ignores_padding(tiny):
  params, seen = make_params(1), []

  def record(params, ids, mask):
    seen.append(ids.shape)
    return embed_text(params, ids, mask)

  found, shapes = [], []
  for lengths in (all_positions, real_tokens):
    context = context_of(embed_text=record, text_lengths=lengths)
    data = embed.open_data(context, "tiny", batch_size=16, captions=3)
    weigh = zeroshot.class_weights(
      context,
      classnames=tiny.classnames,
      templates=["{}", "a {}", "big {}", "the {} x"],  # of 4 to 10 tokens
      batch_size=8,
    )
    embedded = embed.embedder(context, data)(params)
    found.append((weigh(params), jnp.where(embedded.texts_valid[..., None], embedded.ztxt, 0)))
    shapes.append({*seen})
    seen.clear()
  for cut, whole in zip(found[1], found[0]):
    np.testing.assert_allclose(cut, whole, rtol=0, atol=1e-6)
  assert shapes[0] == {(48, LENGTH), (8, LENGTH)}
  assert shapes[1] == {(48, 8), (8, 8), (8, LENGTH)}  # all prompts but the longest


def test_several_processes_keep_the_padding_of_captions(monkeypatch):
  context = context_of(text_lengths=real_tokens)
  batch = dict(
    texts=np.ones((2, 1, LENGTH), np.int32),
    texts_mask=np.arange(LENGTH) < np.ones((2, 1, 1)),
    texts_valid=np.ones((2, 1), bool),
  )
  assert embed._without_padding(context, batch)["texts"].shape == (2, 1, 8)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  assert embed._without_padding(context, batch) is batch


def test_evaluators_of_one_source_embed_its_images_once(tiny):
  calls = []

  def count(params, image):
    calls.append(image.shape)
    return embed_image(params, image)

  def run(shared, *sizes):
    """All that an evaluator without captions and one with them read."""
    context = context_of(embed_image=count, shared=shared)
    read = [
      embed.open_data(context, "tiny", batch_size=size, captions=3 * (i % 2))
      for i, size in enumerate(sizes)
    ]
    calls.clear()
    params = make_params()
    return [[*embed.embedded_images(context, data, params)] for data in read]

  run(embed.SharedImages(), 16, 16)
  assert len(calls) == 2 * 3  # batches of 37 images; one is broken, so nothing is shared
  tiny.broken = ()
  apart = run(None, 16, 16)
  together = run(embed.SharedImages(), 16, 16)
  assert len(calls) == 3
  jax.tree.map(np.testing.assert_array_equal, together, apart)  # to the bit
  run(embed.SharedImages(), 16, 32)
  assert len(calls) == 3 + 2


def test_embeddings_of_images_are_kept_for_the_evaluators_to_come():
  shared, params = embed.SharedImages(), {}
  for _ in range(3):
    shared.add_reader("a")
  shared.add_reader("b")
  assert shared.take(params, "a") is None and shared.is_wanted("a") and shared.is_wanted("b")
  shared.keep("a", ["z"])
  assert shared.take(params, "a") == ["z"]
  assert shared.take(params, "b") is None and not shared.is_wanted("b")
  assert shared.take(params, "a") == ["z"] and not shared.is_wanted("a")
  assert shared._params is None and not shared._embedded  # released, with the parameters
  assert shared.take(params, "a") is None
  shared.keep("a", ["z"])
  assert shared.take({}, "a") is None  # other parameters


def test_a_collapsed_model_scores_chance_and_nan_comes_last():
  n = 24
  owner = jnp.arange(n)
  same = jnp.ones((n, E))
  gallery, valid = same.reshape(3, 8, 1, E), jnp.ones((3, 8, 1), bool)
  np.testing.assert_array_equal(ranks(same, owner, gallery, owner.reshape(3, 8), valid), owner + 1)
  gallery = gallery.at[0, 0].set(jnp.nan)
  found = ranks(same, owner, gallery, owner.reshape(3, 8), valid)
  np.testing.assert_array_equal(found, [24, *range(1, 24)])


def test_ranks_know_a_query_without_a_positive():
  gallery, valid = jnp.ones((1, 2, 1, E)), jnp.asarray([[[True], [False]]])
  owner = jnp.asarray([[0, 1]])
  found = ranks(jnp.ones((2, E)), jnp.asarray([1, 7]), gallery, owner, valid)
  np.testing.assert_array_equal(found, [0, 0])


def test_names_carry_the_evaluator_unless_it_is_val(tiny):
  found = make("flickr", dict(type="retrieval", source="tiny", captions=3))(make_params())
  assert "val/flickr/text_to_image_R@5" in found


NO_RECALL = "mean_per_class_recall and macro_f1 are means over the others"


def numpy_zeroshot(zimg, labels, weights):
  predicted = np.argsort(-(zimg @ weights.T), axis=1, kind="stable")
  top1 = predicted[:, 0] == labels
  recalls = [top1[labels == k].mean() for k in np.unique(labels)]
  return {
    "top1": top1.mean(),
    "top5": (predicted[:, :5] == labels[:, None]).any(1).mean(),
    "mean_per_class_recall": np.mean(recalls),
    "macro_f1": f1_score(labels, predicted[:, 0], average="macro", labels=np.unique(labels)),
    "num_samples": len(labels),
  }


@pytest.mark.parametrize("batch_size", slow_unless([10, 100], (10).__eq__))
@pytest.mark.parametrize("axes", [dict(), dict(data=4, tensor=2)])
def test_zeroshot_equals_numpy(tiny, batch_size, axes, caplog):
  templates = ["a {}", "{c}s", "the {} here"]
  options = dict(type="zeroshot", source="tiny", templates=templates, batch_size=batch_size)
  params = make_params(1)
  found = make("animals", options, **axes)(params)
  ids, mask = tokenise([fill(t, name) for name in tiny.classnames for t in templates])
  weights = np.asarray(embed_text(params, ids, mask)).reshape(len(tiny.classnames), 3, E).mean(1)
  weights /= np.linalg.norm(weights, axis=1, keepdims=True)
  usable = [i for i in range(len(tiny)) if i not in tiny.broken]  # no caption is needed
  zimg = np.asarray(embed_image(params, tiny.images[usable]))
  expected = numpy_zeroshot(zimg, tiny.labels[usable], weights)
  expected |= {"num_classes": 6, "num_empty_classes": 1, "rejected": 1}
  expected = {f"val/animals-zeroshot-val-{name}": value for name, value in expected.items()}
  assert found == pytest.approx(expected, abs=1e-6)
  assert 5 not in tiny.labels  # a class without samples, which has no recall
  assert f"classes without images: 1 of 6; {NO_RECALL}: ['{tiny.classnames[5]}']" in caplog.text


def test_zeroshot_of_few_classes_has_no_top5_and_ties_go_to_the_first(tiny):
  tiny.classnames, tiny.labels = ("a", "b", "c"), np.arange(37) % 3
  flat = (lambda p, x: jnp.ones((len(x), E)), lambda p, ids, mask: jnp.ones((len(ids), E)))
  found = make("few", dict(type="zeroshot", source="tiny"), towers=flat)(make_params())
  assert "val/few-zeroshot-val-top5" not in found
  assert found["val/few-zeroshot-val-top1"] == pytest.approx(12 / 36)  # sample 3 is broken
  assert found["val/few-zeroshot-val-mean_per_class_recall"] == pytest.approx(1 / 3)
  nan = (lambda p, x: jnp.full((len(x), E), jnp.nan), flat[1])
  found = make("few", dict(type="zeroshot", source="tiny"), towers=nan)(make_params())
  assert found["val/few-zeroshot-val-top1"] == 0


def test_labels_without_a_class_name_are_an_error(tiny, tmp_path):
  tiny.labels[7], tiny.labels[8] = 6, -1
  run = make("animals", dict(type="zeroshot", source="tiny"))
  with pytest.raises(ValueError, match=r"animals.*2 of 36.*6 class names"):
    run(make_params())
  tiny.classnames = ()
  with pytest.raises(ValueError, match=r"classnames\.txt"):
    make("animals", dict(type="zeroshot", source="tiny"))
  (tmp_path / "names.txt").write_text("\nant\nbee\n")
  with pytest.raises(ValueError, match=r"names\.txt: line 1 is blank"):
    make("animals", dict(type="zeroshot", source="tiny", classnames=f"{tmp_path}/names.txt"))


def test_a_source_without_a_usable_sample_is_an_error(tiny):
  tiny.broken = range(37)
  for options in (dict(type="zeroshot"), dict(type="retrieval", captions=3)):
    with pytest.raises(ValueError, match=r"config\.evals\.x.*(all 36|all 37|none of the 37)"):
      make("x", dict(options, source="tiny"))(make_params())


def test_rejected_samples_are_told_in_the_log(tiny, caplog):
  make("val", dict(type="retrieval", source="tiny", captions=3))(make_params())
  assert "1 undecodable" in caplog.text and "35 of 37" in caplog.text


def test_templates_by_name_by_file_and_as_they_are(tmp_path, monkeypatch):
  assert {"name", "simple", "photos"} <= {*PROMPTS}
  assert all(len(set(read_templates(name))) == len(read_templates(name)) for name in PROMPTS)
  (tmp_path / "t.txt").write_text("a {c}.\n\nthe {c}.\n")
  (tmp_path / "t.json").write_text('["one {}"]')
  monkeypatch.setenv("PLACE", str(tmp_path))
  assert read_templates("$PLACE/t.txt") == ["a {c}.", "the {c}."]
  assert read_templates(str(tmp_path / "t.json")) == ["one {}"]
  assert fill("a {c} in {place}", "{x}") == "a {x} in {place}"
  assert len(read_templates("varied")) == 80
  with pytest.raises(ValueError, match=r"'photo'.*'photos'"):
    read_templates("photo")
  with pytest.raises(ValueError, match=r"no \{c\} or \{\}"):
    read_templates(["a cat"])
  with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
    read_templates("nowhere.txt")
  (tmp_path / "t.json").write_text('{"cifar10": ["a {}"]}')
  with pytest.raises(ValueError, match=r"dict with the keys \['cifar10'\]"):
    read_templates(str(tmp_path / "t.json"))


def test_templates_of_clip_are_those_of_an_installed_open_clip(tmp_path, monkeypatch):
  folder = tmp_path / "open_clip"
  folder.mkdir()
  (folder / "__init__.py").write_text("raise ImportError('needs PyTorch')")
  lines = "OPENAI_IMAGENET_TEMPLATES = (lambda c: f'art of the {c}.', lambda c: f'many {c}.')"
  (folder / "zero_shot_metadata.py").write_text(lines)
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.delitem(sys.modules, "open_clip", raising=False)
  assert read_templates("open_clip") == ["art of the {c}.", "many {c}."]
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ImportError, match=r"x\.templates='open_clip'.*pip install open_clip_torch"):
    read_templates("open_clip", "x.templates")


@pytest.mark.skipif(
  importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed"
)
def test_the_installed_open_clip_has_the_80_templates_of_clip():
  found = read_templates("open_clip")
  assert len({*found}) == 80 and "a bad photo of a {c}." in found
  assert not {fill(x, "x") for x in found} & {fill(x, "x") for x in read_templates("varied")}


def test_unknown_evaluators_and_options_name_the_known(tiny):
  with pytest.raises(ValueError, match=r"config\.evals\.val\.type.*'retrieval'"):
    make("val", dict(type="retreival", source="tiny"))
  with pytest.raises(ValueError, match=r"config\.evals\.val\.type.*absent"):
    make("val", dict(source="tiny"))
  with pytest.raises(TypeError, match=r"config\.evals\.val.*'caption'.*'captions'"):
    make("val", dict(type="retrieval", source="tiny", caption=5))
  assert {"retrieval", "zeroshot"} <= {*EVALS}


def test_real_shards_go_through(data_root):
  context = Context("cifar10", embed_image, embed_text, sharding.make_mesh(), DATA)
  run = EVALS["zeroshot"](
    context,
    source=str(data_root / "cifar10/test/0.tar"),
    batch_size=384,
    templates=str(data_root / "cifar10/zeroshot_classification_templates.txt"),
  )
  found = run(make_params())
  assert found["val/cifar10-zeroshot-val-num_samples"] == 1000
  assert 0.05 < found["val/cifar10-zeroshot-val-top1"] < 0.25  # random towers


TWO = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
from bigalign.run import runtime
runtime.connect()
import test_evals as t
t.embed.open_source = t.open_tiny
found = t.every_evaluator(sys.argv[2])
path = pathlib.Path(sys.argv[2]) / f"{t.jax.process_index()}.json"
path.write_text(json.dumps([t.jax.process_count(), t.jax.device_count(), found]))
"""


def open_tiny(spec, **options):
  return Tiny() if spec == "tiny" else open_source(spec, **options)


def write_shard(folder, count=21):
  """A shard with all that evaluators read besides a pair, whose image 3 does not decode."""
  rng = np.random.default_rng(1)
  members = []
  for i in range(count):
    words = ["".join(rng.choice([*"abcdefgh"], 6)) for _ in range(5)]
    boxes = [dict(box=[k / 2, 0, 1, 1], phrase=words[k]) for k in range(i % 3)]
    record = dict(en=words[:2], de=words[2 : 2 + i % 3], region=f"r{i % 3}", regions=boxes)
    file = io.BytesIO()
    Image.fromarray(rng.choice([0, 1, 2, 255], (SIZE, SIZE)).astype(np.uint8)).save(file, "png")
    image = picture(i, size=(SIZE, SIZE), kind="png")
    members += [
      (f"{i:03}.jpg", b"no image" if i == 3 else image),
      (f"{i:03}.cls", str(i % 5).encode()),
      (f"{i:03}.json", json.dumps(record).encode()),
      (f"{i:03}.seg.png", file.getvalue()),
    ]
  write_tar(folder / "made.tar", members)
  (folder / "classnames.txt").write_text("\n".join(Tiny.classnames))
  counts = {name: 10**k for k, name in enumerate(Tiny.classnames)}
  (folder / "counts.json").write_text(json.dumps(counts))


def write_cues(folder):
  """Cues with their candidates, of which image 4 does not decode."""
  (folder / "images").mkdir()
  for i in range(9):
    image = picture(i, size=(SIZE, SIZE), kind="png")
    (folder / f"images/{i}.png").write_bytes(b"no image" if i == 4 else image)
  cues = [
    dict(cue=cue, candidates=[str(k) for k in some], associations=[str(k) for k in some[1:3]])
    for cue, some in dict(
      owl=range(4), moon=range(2, 7), pie=range(5, 9), Sun=range(0, 9, 3)
    ).items()
  ]
  (folder / "cues.json").write_text(json.dumps(cues))


def every_evaluator(folder):
  shard = f"{folder}/made.tar"
  evaluators = dict(
    val=dict(type="retrieval", source="tiny", captions=3),
    animals=dict(type="zeroshot", source="tiny", calibration=True, ood="tiny", widths=(3,)),
    babel=dict(type="zeroshot", source="tiny", classnames=f"{folder}/languages.json"),
    described=dict(type="zeroshot", source="tiny", descriptions=f"{folder}/sentences.json"),
    pairs=dict(type="compositional", folder=f"{folder}/pairs"),
    same=dict(type="image_retrieval", source="tiny"),
    noise=dict(type="corruptions", source="tiny", kinds=("shot_noise",), severities=(2,)),
    grouped=dict(
      type="zeroshot", source=shard, groups="json.region", frequency=f"{folder}/counts.json"
    ),
    spoken=dict(type="retrieval", source=shard, languages=dict(en="json.en", de="json.de")),
    texts=dict(type="text_retrieval", source=shard, fields=("json.en",)),
    translated=dict(type="text_retrieval", source=shard, fields=("json.en",), among=("json.de",)),
    cues=dict(type="associations", file=f"{folder}/cues.json"),
    places=dict(type="segmentation", source=shard, classnames=f"{folder}/classnames.txt"),
    boxes=dict(type="region_retrieval", source=shard),
  )
  found = {}
  for name, options in evaluators.items():
    run = make(name, options | dict(batch_size=10), logit_head=lambda _: LogitHead(9.0, 0.0, False))
    found |= run(make_params())
    if name == "animals":
      found["confusion"] = run.confusion(make_params()).matrix().tolist()
  return found


@pytest.mark.slow
def test_two_processes_find_what_one_finds(monkeypatch, tmp_path):
  monkeypatch.setattr(embed, "open_source", open_tiny)
  write_shard(tmp_path)
  write_cues(tmp_path)
  test_compositional = importlib.import_module("test_compositional")  # which imports this module
  test_compositional.winoground_files(tmp_path / "pairs")
  sentences = {name: [f"a {name}", name][: 1 + len(name) % 2] for name in Tiny.classnames}
  (tmp_path / "sentences.json").write_text(json.dumps(sentences))
  labels = dict(en=[[*range(6)], [*Tiny.classnames]], fr=[[1, 3], ["abeille", "chien"]])
  (tmp_path / "languages.json").write_text(json.dumps(labels))
  (tmp_path / "two.py").write_text(TWO)
  here = pathlib.Path(__file__).parent
  root = here.parents[1]
  subprocess.run(
    [
      "bash",
      str(root / "launch/local.sh"),
      "-n",
      "2",
      "-d",
      "4",
      "-o",
      str(tmp_path),
      "--",
      sys.executable,
      str(tmp_path / "two.py"),
      str(here),
      str(tmp_path),
    ],
    check=True,
    timeout=600,
    env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"},
  )
  expected = every_evaluator(tmp_path)
  fitted = ("val/animals-zeroshot-val-calibrated_temperature", "ece_rest_calibrated")  # by sums
  for process in range(2):
    processes, devices, found = json.loads((tmp_path / f"{process}.json").read_text())
    assert (processes, devices) == (2, 8) and found.keys() == expected.keys()
    for name, value in found.items():
      assert value == (pytest.approx(expected[name]) if name.endswith(fitted) else expected[name])
