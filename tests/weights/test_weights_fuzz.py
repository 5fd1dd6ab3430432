"""Files that somebody damaged, or made to do harm: each is refused, by its name and key.

None takes more memory than twice its true size; none runs code.
"""

from __future__ import annotations

import copy
import functools
import json
import pickle
import random
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.damaged_files import HUGE, Harm, refused, shapes_of
from helpers.mutations import places
from helpers.small_checkpoints import CLIP, PICTURE, clip_keys, folder, save
from helpers.tower_oracles import CASES, ROOT, Side

from bigalign import weights
from bigalign.towers import TOWERS


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  """A CLIP of 1.5 MB: what Python itself needs to look at it is small beside that."""
  arrays = clip_keys()
  key = "text_model.embeddings.token_embedding.weight"
  arrays[key] = np.random.default_rng(0).standard_normal((48_000, 8)).astype(np.float32)
  config = copy.deepcopy(CLIP)
  config["text_config"]["vocab_size"] = 48_000
  return folder(tmp_path_factory.mktemp("clip"), config, arrays), config


def header_of(file):
  data = file.read_bytes()
  length = int.from_bytes(data[:8], "little")
  return json.loads(data[8 : 8 + length]), data[8 + length :]


def put(file, header, data):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  file.write_bytes(len(text).to_bytes(8, "little") + text + data)


# What to do to one entry of a safetensors header.
ENTRIES = [
  lambda e, rng: e.update(dtype=rng.choice(["F99", "f32", "O", "F64", "F16", 3, None, ["F32"]])),
  lambda e, rng: e.update(
    shape=rng.choice(
      [
        [HUGE],
        [-1, -8],
        [2**62, 2**62],
        "8",
        [1.5],
        [True],
        [[8]],
        None,
        [10**400],
        [0],
        [1] * 99,
      ]
    )
  ),
  lambda e, rng: e.update(
    data_offsets=rng.choice(
      [
        [0, HUGE],
        [-8, 0],
        [8, 0],
        [0],
        [0, 1, 2],
        "0",
        [0.0, 8.0],
        None,
        [HUGE, HUGE],
        [True, 9],
      ]
    )
  ),
  lambda e, rng: e["data_offsets"].__setitem__(0, e["data_offsets"][0] + rng.choice([-4, 4, 1])),
  lambda e, rng: e["data_offsets"].__setitem__(1, e["data_offsets"][1] + rng.choice([-4, 4, 1])),
  lambda e, rng: e["shape"].insert(0, rng.choice([2, HUGE, 0])),
  lambda e, rng: e.update(more=1),
  lambda e, rng: e.pop(rng.choice(sorted(e))),
]


@pytest.mark.parametrize("seed", range(4))
def test_damaged_safetensors_are_refused(clip, tmp_path, seed):
  """30 of each seed: entries that lie, and bytes of the header turned over."""
  good, config = clip
  rng = random.Random(seed)
  shapes = shapes_of(weights.describe(good))
  header, data = header_of(good / "model.safetensors")
  path = folder(tmp_path / "bad", config, {})
  file = path / "model.safetensors"
  for i in range(30):
    bad, key = copy.deepcopy(header), rng.choice(sorted(header.keys() - {"__metadata__"}))
    if i < 20:
      ENTRIES[i % len(ENTRIES)](bad[key], rng)
      put(file, bad, data)
      message = refused(path, shapes)
      assert str(file) in message, message
      # A tensor that ends elsewhere is seen at the next one.
      assert any(name in message for name in header) or "its header says" in message, message
    else:
      header_only = {k: v for k, v in header.items() if k != "__metadata__"}
      text = bytearray(json.dumps(header_only).encode())
      text[rng.randrange(len(text))] ^= 1 << rng.randrange(7)
      put(file, bytes(text), data)
      assert str(file) in refused(path, shapes)


def test_files_that_are_no_safetensors_are_refused(clip, tmp_path):
  good, config = clip
  whole = (good / "model.safetensors").read_bytes()
  header, data = header_of(good / "model.safetensors")
  path = folder(tmp_path / "bad", config, {})
  file = path / "model.safetensors"
  shapes = shapes_of(weights.describe(good))
  trap = tmp_path / "harm"
  twice = json.dumps(header).encode()
  twice = twice[:-1] + b"," + twice[1:]
  for content in (
    *(whole[:n] for n in (7, 8, 100, len(whole) // 2, len(whole) - 1)),
    whole + b"\0",
    *((n).to_bytes(8, "little") + whole[8:] for n in (0, 1, HUGE, 2**64 - 1, len(whole))),
    pickle.dumps(Harm(trap)) + bytes(4_000),
    b"\x80\x04" + whole,
    *(
      len(x).to_bytes(8, "little") + x + data
      for x in (
        twice,
        b"[" * 3_000,
        b"[]",
        b"null",
        b'{"__metadata__": 3}',
        b"\xff\xfe",
        b"",
        b'{"__metadata__": {"a": 1}}',
        b'{"a":' * 2_000,
      )
    ),
  ):
    file.write_bytes(content)
    assert str(file) in refused(path, shapes)
  assert not trap.exists()


# Sizes that no tensor can have, for every size in a config; a size that another tensor has.
WRONG = ["12", -1, 0, HUGE, 1e9, None, [], {}, True, float("nan"), 0.5]
SIZES = [
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
]


@pytest.mark.parametrize(
  "side,keys",
  [
    ("vision_config", [*SIZES, "patch_size", "layer_norm_eps", "hidden_act"]),
    ("text_config", [*SIZES, "vocab_size", "max_position_embeddings", "eos_token_id"]),
  ],
)
def test_damaged_configs_are_refused(clip, tmp_path, side, keys):
  """A value of another kind, with the file and the key; a text that is cut."""
  good, config = clip
  path = tmp_path / "bad"
  path.mkdir()
  (path / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes())
  file = path / "config.json"
  fine = {
    ("layer_norm_eps", "0"),
    ("eos_token_id", "0"),
    ("eos_token_id", "None"),
    ("layer_norm_eps", "0.5"),
    ("layer_norm_eps", repr(HUGE)),
  }
  for key in keys:
    for value in WRONG:
      if (key, repr(value)) in fine:
        continue
      bad = copy.deepcopy(config)
      bad[side][key] = value
      file.write_text(json.dumps(bad))
      message = refused(path, {"t": jax.ShapeDtypeStruct((), jnp.float32)})
      assert str(file) in message and key in message, (key, value, message)
  text = json.dumps(config)
  for n in range(0, len(text) - 1, 80):
    file.write_text(text[:n])
    assert str(file) in refused(path, {"t": jax.ShapeDtypeStruct((), jnp.float32)})


@pytest.mark.parametrize(
  "side,key,value,tensor",
  [
    ("vision_config", "hidden_size", 24, "vision_model.pre_layrnorm.weight [12]"),
    ("vision_config", "intermediate_size", 21, "layers.0.mlp.fc1.weight [20, 12]"),
    ("vision_config", "num_hidden_layers", 3, "vision_model.encoder.layers.2.layer_norm1.weight"),
    ("vision_config", "num_hidden_layers", 1, "vision_model.encoder.layers.1.layer_norm1.weight"),
    ("vision_config", "patch_size", 8, "patch_embedding.weight [12, 3, 4, 4]"),
    ("text_config", "vocab_size", 2**24, "token_embedding.weight [48000, 8]"),
    ("text_config", "max_position_embeddings", 7, "position_embedding.weight [6, 8]"),
  ],
)
def test_a_config_of_another_geometry_is_refused(clip, tmp_path, side, key, value, tensor):
  """Before memory is taken, by the tensors that differ."""
  good, config = clip
  path = tmp_path / "bad"
  path.mkdir()
  (path / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes())
  bad = copy.deepcopy(config)
  bad[side][key] = value
  (path / "config.json").write_text(json.dumps(bad))
  shapes = shapes_of(weights.describe(path))
  message = refused(path, shapes)
  assert str(path / "model.safetensors") in message and tensor in message, message


def test_a_whole_file_is_read_within_its_size(clip):
  """Beside the arrays that it becomes, reading takes little: tensors come one by one."""
  good, _ = clip
  checkpoint = weights.describe(good)
  shapes = shapes_of(checkpoint)
  tracemalloc.start()
  found = checkpoint.load(shapes)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 1.3 * sum(x.nbytes for x in found.values())


def test_save_and_side_agree(clip, tmp_path):
  """The writer of these tests is no source of faults: what it wrote is read to the bit."""
  good, config = clip
  checkpoint = weights.describe(good)
  arrays = {key: np.array(checkpoint.tensors.read(key)) for key in checkpoint.tensors}
  save(tmp_path / "model.safetensors", arrays)
  (tmp_path / "config.json").write_text(json.dumps(config))
  one, two = (Side(weights.describe(x), "image", (PICTURE,)).flat for x in (good, tmp_path))
  assert all(np.array_equal(one[path], two[path]) for path in one)


@pytest.mark.parametrize("case", [x for x in CASES if not (ROOT / x / "weights.npz").is_file()])
def test_any_config_is_read_or_refused_by_name(case, tmp_path):
  """20 changes of each kind of checkpoint, in all of its JSON files."""
  rng = random.Random(case)
  path = tmp_path / "bad"
  shutil.copytree(ROOT / case, path)
  configs = [x for x in sorted(path.rglob("*.json")) if x.name != "meta.json"]
  for _ in range(20):
    file = rng.choice(configs)
    good = file.read_text()
    bad = json.loads(good)
    *way, last = rng.choice(list(places(bad)))
    node = functools.reduce(lambda x, key: x[key], way, bad)
    node[last] = rng.choice([*WRONG, [1, 2], {"a": 1}, -10.5, "\0" * 300])
    file.write_text(json.dumps(bad))
    try:
      checkpoint = weights.describe(path)
      for side in checkpoint.model.keys() & {"image", "text"}:
        given = dict(checkpoint.model[side])
        TOWERS[given.pop("name")](**given).build()
    except (ValueError, FileNotFoundError) as error:
      assert str(path) in str(error), (bad, error)
    file.write_text(good)


@pytest.mark.parametrize("name", ["a" * 5_000, "a/b", "..", "\0", "", "é" * 200])
def test_an_index_that_names_what_cannot_be_a_file_is_refused(tmp_path, name):
  folder(tmp_path, CLIP, {})
  (tmp_path / "model.safetensors").unlink()
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps(dict(weight_map=dict(key=name))))
  with pytest.raises(ValueError, match=r"key: .* is not a file next to the index") as error:
    weights.describe(tmp_path)
  assert str(index) in str(error.value) and len(str(error.value)) < 600
