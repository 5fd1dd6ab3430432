"""npz files of big_vision and of convolutional towers: stacked layers, and damaged files."""

from __future__ import annotations

import random
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.damaged_files import (
  HUGE,
  array_bytes,
  members,
  put_members,
  refused,
  shapes_of,
  untrue,
)
from helpers.small_checkpoints import IDS, PICTURE

from bigalign import tree, weights
from bigalign.towers import TOWERS, mobilenet
from bigalign.weights import transfer


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
  """A big_vision npz of 1.6 MB: (file, {key: array}, shapes of what is read)."""
  size = dict(width=8, depth=2, heads=2, mlp_ratio=2.0)
  model = dict(
    image=dict(name="vit", patch=4, pool="map", **size),
    text=dict(name="text", vocab_size=48_000, length=6, mask_padding=False, **size),
  )
  arrays, shapes = {}, {}
  rng = np.random.default_rng(0)
  for side, example in (("image", PICTURE), ("text", IDS)):
    given = dict(model[side])
    tower = TOWERS[given.pop("name")](**given).build()
    made = jax.eval_shape(tower.init, jax.random.key(0), example)["params"]
    shapes |= tree.flatten(made, f"{side}_tower/")
  arrays = {k: rng.standard_normal(x.shape).astype(np.float32) for k, x in shapes.items()}
  names = {
    "encoder/ln": "encoder_norm",
    "encoder/blocks": "encoderblock",
    "positions": "pos_embedding",
    "ln1": "LayerNorm_0",
    "ln2": "LayerNorm_1",
    "/ln/": "/LayerNorm_0/",
    "attn": "MultiHeadDotProductAttention_0",
    "mlp/fc1": "MlpBlock_0/Dense_0",
    "mlp/fc2": "MlpBlock_0/Dense_1",
    "map_head": "MAPHead_0",
  }
  theirs = {}
  for path, x in arrays.items():
    for ours, other in names.items():
      path = path.replace(ours, other)
    path = path.replace("image_tower/encoder", "img/Transformer/encoder")
    path = path.replace("text_tower/encoder", "txt/Encoder_0/encoder")
    path = path.replace("text_tower/embedding", "txt/Embed_0/embedding")
    theirs["params/" + path.replace("image_tower", "img").replace("text_tower", "txt")] = x
  theirs |= {
    "params/txt/head/kernel": np.zeros((8, 8), np.float32),
    "params/txt/head/bias": np.zeros(8, np.float32),
  }
  file = tmp_path_factory.mktemp("npz") / "siglip.npz"
  np.savez(file, **theirs)
  return file, theirs, shapes, arrays


def test_an_npz_with_stacked_layers_is_read(siglip):
  """As SigLIP 2's are; theirs -> ours -> theirs."""
  file, theirs, shapes, arrays = siglip
  checkpoint = weights.describe(file)
  found = checkpoint.load(shapes)
  for path, x in arrays.items():
    np.testing.assert_array_equal(found[path], x, err_msg=path)
  head = checkpoint.load(
    {
      f"text_projector/out/{name}": jax.ShapeDtypeStruct(shape, jnp.float32)
      for name, shape in (("kernel", (8, 8)), ("bias", (8,)))
    }
  )
  back = dict(transfer.write(checkpoint.layout, found | head))
  assert back.keys() == theirs.keys()
  for key, x in theirs.items():
    np.testing.assert_array_equal(back[key], x, err_msg=key)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_npz_are_refused(siglip, tmp_path, seed):
  """30 of each seed: arrays that lie or hold objects, and bytes turned over."""
  good, theirs, shapes, _ = siglip
  rng = random.Random(seed)
  content = members(good)
  whole = good.read_bytes()
  trap = tmp_path / "harm"
  file = tmp_path / "bad.npz"
  for i in range(30):
    # A key that the image tower or the text tower is made of.
    key = rng.choice([x for x in sorted(theirs) if "head" not in x])
    lies = untrue(theirs[key], trap)
    if i < len(lies):
      put_members(file, content | {f"{key}.npy": lies[i]})
      message = refused(file, shapes)
      assert str(file) in message and key in message, (i, message)
    elif i < len(lies) + 3:
      file.write_bytes(whole[: rng.randrange(len(whole))])
      assert str(file) in refused(file, shapes)
    else:  # a byte of an array that is read, or of its header: the archive has a checksum
      start = whole.index(content[f"{key}.npy"])
      at = start + rng.randrange(len(content[f"{key}.npy"]))
      file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
      message = refused(file, shapes)
      assert str(file) in message and key in message, message
  assert not trap.exists()


def test_a_small_file_that_unpacks_to_much_is_refused(siglip, tmp_path):
  """Its header is believed no further than the archive's own sizes, and those than the data."""
  good, _, shapes, _ = siglip
  content = members(good)
  file = tmp_path / "bomb.npz"
  key = "params/txt/Embed_0/embedding"
  for claim in ((HUGE, 8), (48_000 * 20, 8)):
    bomb = array_bytes("<f4", claim, bytes(48_000 * 8 * 4 * 20))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
      for name, data in content.items():
        archive.writestr(name, bomb if name == f"{key}.npy" else data)
    message = refused(file, shapes)
    assert str(file) in message and key in message


def test_an_error_about_an_archive_does_not_repeat_its_data(siglip, tmp_path):
  """zipfile shows the name in a header, whose length may reach into the arrays."""
  good, _, shapes, _ = siglip
  data, file = bytearray(good.read_bytes()), tmp_path / "bad.npz"
  data[26:28] = (50_000).to_bytes(2, "little")
  file.write_bytes(data)
  message = refused(file, shapes)
  assert str(file) in message and "characters)" in message and len(message) < 1_000


def resnet_keys():
  """{key: shape} of a ResNet-14, as torch saves it."""
  convs = {"conv1": (16, 3, 3, 3), "linear": (10, 64)}
  for stage, width in enumerate((16, 32, 64), 1):
    for block, conv in ((0, 1), (0, 2), (1, 1), (1, 2)):
      inside = width // 2 if stage > 1 and (block, conv) == (0, 1) else width
      convs[f"layer{stage}.{block}.conv{conv}"] = (width, inside, 3, 3)
  found = {f"{name}.weight": shape for name, shape in convs.items()} | {"linear.bias": (10,)}
  leaves = ("weight", "bias", "running_mean", "running_var")
  return found | {
    f"{name.replace('conv', 'bn')}.{leaf}": shape[:1]
    for name, shape in convs.items()
    if name != "linear"
    for leaf in leaves
  }


def mobilenet_keys():
  """{key: shape} of a MobileNetV2, as TF-slim names it."""
  convs = {"Conv2d_0_0": (32, 3, 3, 3), "top": (10, 1, 1, 1280), "Conv2d_18_1": (1280, 1, 1, 320)}
  width, i = 32, 0
  for expansion, features, blocks, _ in mobilenet.STAGES:
    for _ in range(blocks):
      i, wide = i + 1, expansion * width
      if expansion > 1:
        convs[f"expanded_conv_{i}/expand"] = (wide, 1, 1, width)
      convs[f"expanded_conv_{i}/depthwise"] = (1, 3, 3, wide)
      convs[f"expanded_conv_{i}/project"] = (features, 1, 1, wide)
      width = features
  biases = {f"{k}/bias": x[-1:] if "depthwise" in k else x[:1] for k, x in convs.items()}
  return {f"{k}/kernel": x for k, x in convs.items()} | biases


@pytest.mark.slow
@pytest.mark.parametrize(
  "kind,keys,unread",
  [("resnet_cifar", resnet_keys, "linear"), ("mobilenet_v2", mobilenet_keys, "top")],
)
def test_damaged_convolutional_towers_are_refused(kind, keys, unread, tmp_path):
  """Arrays that lie, hold objects, are of another size, missing or too many; bytes turned over."""
  arrays = {k: np.zeros(shape, np.float32) for k, shape in keys().items()}
  good, file, trap = tmp_path / "good.npz", tmp_path / "bad.npz", tmp_path / "harm"
  np.savez(good, **arrays)
  checkpoint = weights.describe(good)
  shapes = shapes_of(checkpoint)
  assert checkpoint.kind == kind and checkpoint.load(shapes).keys() == shapes.keys()
  content, whole, rng = members(good), good.read_bytes(), random.Random(kind)
  names = [x for x in sorted(arrays) if not x.startswith(unread)]

  def check(key):
    message = refused(file, shapes)
    assert str(file) in message and key in message, message

  for i in range(len(untrue(arrays[names[0]], trap))):
    key = rng.choice(names)
    put_members(file, content | {f"{key}.npy": untrue(arrays[key], trap)[i]})
    check(key)
  for x in (np.zeros((3, 5), np.float32), np.zeros(arrays[key].shape, np.int8)):
    np.savez(file, **arrays | {key: x})
    check(key)
  np.savez(file, **arrays | {"more/kernel": arrays[key]})
  check("more/kernel")
  for key in rng.sample(names, 4):
    np.savez(file, **{k: x for k, x in arrays.items() if k != key})
    check(key)
    start = whole.index(f"{key}.npy".encode()) + len(f"{key}.npy")
    at = rng.randrange(whole.index(b"\x93NUMPY", start), start + len(content[f"{key}.npy"]))
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
    check(key)
  assert not trap.exists()
