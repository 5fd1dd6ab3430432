"""npz files of big_vision: stacked layers, and files that somebody damaged."""

from __future__ import annotations

import io
import pickle
import random
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import IDS, PICTURE
from damage import HUGE, Harm, refused

from bigalign import tree, weights
from bigalign.towers import TOWERS
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
    tower = TOWERS[given.pop("name")](**given)
    made = jax.eval_shape(tower.init, jax.random.key(0), example)["params"]
    shapes |= tree.flatten(made, f"{side}_tower/")
  arrays = {k: rng.standard_normal(x.shape).astype(np.float32) for k, x in shapes.items()}
  names = {
    "encoder/ln": "encoder_norm", "encoder/blocks": "encoderblock", "positions": "pos_embedding",
    "ln1": "LayerNorm_0", "ln2": "LayerNorm_1", "/ln/": "/LayerNorm_0/",
    "attn": "MultiHeadDotProductAttention_0", "mlp/fc1": "MlpBlock_0/Dense_0",
    "mlp/fc2": "MlpBlock_0/Dense_1", "map_head": "MAPHead_0",
  }
  theirs = {}
  for path, x in arrays.items():
    for ours, other in names.items():
      path = path.replace(ours, other)
    path = path.replace("image_tower/encoder", "img/Transformer/encoder")
    path = path.replace("text_tower/encoder", "txt/Encoder_0/encoder")
    path = path.replace("text_tower/embedding", "txt/Embed_0/embedding")
    theirs["params/" + path.replace("image_tower", "img").replace("text_tower", "txt")] = x
  theirs |= {"params/txt/head/kernel": np.zeros((8, 8), np.float32),
             "params/txt/head/bias": np.zeros(8, np.float32)}
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
  head = checkpoint.load({
    f"text_projector/out/{name}": jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in (("kernel", (8, 8)), ("bias", (8,)))
  })
  back = dict(transfer.write(checkpoint.layout, found | head))
  assert back.keys() == theirs.keys()
  for key, x in theirs.items():
    np.testing.assert_array_equal(back[key], x, err_msg=key)


def members(file):
  """{name: bytes} of an npz."""
  with zipfile.ZipFile(file) as archive:
    return {x.filename: archive.read(x) for x in archive.infolist()}


def array_bytes(descr, shape, data=b"", columns=False):
  """An npy file whose header need not be true."""
  text = repr(dict(descr=descr, fortran_order=columns, shape=shape)).encode()
  return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize("seed", range(3))
def test_damaged_npz_are_refused(siglip, tmp_path, seed):
  """30 of each seed: arrays that lie or hold objects, and bytes turned over."""
  good, theirs, shapes, _ = siglip
  rng = random.Random(seed)
  content = members(good)
  whole = good.read_bytes()
  trap = tmp_path / "harm"
  objects = io.BytesIO()
  np.save(objects, np.array([Harm(trap)], object), allow_pickle=True)
  file = tmp_path / "bad.npz"
  for i in range(30):
    # A key that the image tower or the text tower is made of.
    key = rng.choice([x for x in sorted(theirs) if "head" not in x])
    true = theirs[key]
    lies = [
      objects.getvalue(),
      array_bytes("|O", true.shape, pickle.dumps(Harm(trap))),
      array_bytes("<f4", (HUGE,), true.tobytes()),
      array_bytes("<f4", (2**62, 2**62), true.tobytes()),
      array_bytes("<f4", (-1, 4), true.tobytes()),
      array_bytes("<f4", (1.5,), true.tobytes()),
      array_bytes("<f4", true.shape, true.tobytes()[:-4]),
      array_bytes("<f4", true.shape, true.tobytes() + b"\0"),
      array_bytes("<f4", (*true.shape, 1), true.tobytes()),
      array_bytes("<i4", true.shape, true.tobytes()),
      array_bytes([("a", "<f4")], true.shape, true.tobytes()),
      array_bytes(",f4,O", true.shape, true.tobytes()),
      content[f"{key}.npy"][:20], b"", b"\x93NUMPY\x09\x00", pickle.dumps(Harm(trap)),
      b"\x93NUMPY\x02\x00" + b"\xff" * 4 + content[f"{key}.npy"][10:],
      b"\x93NUMPY\x01\x00\x20\x00__import__('os').mkdir('harm')  " + true.tobytes(),
    ]
    if i < len(lies):
      with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
          archive.writestr(name, lies[i] if name == f"{key}.npy" else data)
      message = refused(file, shapes)
      assert str(file) in message and key in message, (i, message)
    elif i < len(lies) + 3:
      file.write_bytes(whole[:rng.randrange(len(whole))])
      assert str(file) in refused(file, shapes)
    else:  # a byte of an array that is read, or of its header: the archive has a checksum
      start = whole.index(content[f"{key}.npy"])
      at = start + rng.randrange(len(content[f"{key}.npy"]))
      file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1:])
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
