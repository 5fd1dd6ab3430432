"""Attention by XLA, by cuDNN and on TPUs: which is chosen, what it gets, that all mean the same.

No GPU runs here. jax's checks of what cuDNN can compute are run on traced programs, and the
arithmetic of padding is checked with XLA in place of cuDNN's kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import sys

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cudnn import on_a_gpu  # noqa: F401
from helpers.marks import slow_unless
from helpers.shipped import ROOT, load
from helpers.tpu_compiler import needs_libtpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from bigalign import sharding
from bigalign.config import resolve_config
from bigalign.plan import topologies
from bigalign.towers import TOWERS, attention, tpu_attention
from bigalign.towers.attention import Device

AMPERE, TURING, AMD = Device("gpu", (8, 0)), Device("gpu", (7, 5)), Device("gpu")
TPU = Device("tpu")
BATCH = 3
TINY = dict(width=16, heads=2, depth=1, scan=False, dtype="float32")
IMAGE = jax.random.normal(jax.random.key(0), (BATCH, 12, 12, 3))  # 9 patches of 4 pixels
IDS = jax.random.randint(jax.random.key(1), (BATCH, 7), 1, 9)
MASK = jnp.arange(7)[None] < jnp.asarray([[1], [4], [7]])
TEXT = dict(vocab_size=9, length=7, **TINY)
# name: tower, its inputs, and the number of tokens that cuDNN gets
ODD = {
  "patches": (TOWERS["vit"](patch=4, pool="mean", **TINY), (IMAGE,), 10),
  "rotated": (TOWERS["vit"](patch=4, pool="map", positions="rope", **TINY), (IMAGE,), 10),
  "causal": (TOWERS["text"](causal=True, pool="eos", **TEXT), (IDS, MASK), 8),
  "masked": (TOWERS["text"](pool="mean", **TEXT), (IDS, MASK), 8),
  "distances": (TOWERS["bert"](buckets=4, **TEXT), (IDS, MASK), 8),
}
FAST = {"patches", "causal"}


@pytest.mark.parametrize(
  "device,options,expected",
  [
    (AMPERE, {}, "cudnn"),
    (Device("gpu", (10, 0)), {}, "cudnn"),
    (AMPERE, dict(mask="end"), "cudnn"),
    (AMPERE, dict(mask="any"), "xla"),
    (AMPERE, dict(bias=True), "xla"),
    (AMPERE, dict(dtype=np.dtype("float16")), "cudnn"),
    (AMPERE, dict(dtype=np.dtype("float32")), "xla"),
    (AMPERE, dict(head=72), "cudnn"),
    (AMPERE, dict(head=128), "cudnn"),
    (AMPERE, dict(head=136), "xla"),
    (AMPERE, dict(head=20), "xla"),
    (TURING, {}, "xla"),
    (AMD, {}, "xla"),
    (Device("cpu"), {}, "xla"),
    (TPU, {}, "tpu"),
    (TPU, dict(mask="any"), "tpu"),
    (TPU, dict(bias=True), "xla"),
    (TPU, dict(dtype=np.dtype("float32")), "xla"),
    (TPU, dict(head=72), "xla"),
    (TPU, dict(heads=3), "xla"),
    (TPU, dict(tokens=577), "tpu"),
    (TPU, dict(tokens=1025), "xla"),
  ],
)
def test_auto_is_the_kernel_that_can_compute_a_tower(device, options, expected):
  call = dict(dtype=jnp.dtype("bfloat16"), tokens=197, heads=12, head=64, mask="none", bias=False)
  call |= options
  assert attention.choose("auto", device, **call) == expected
  for fixed in ("xla", None):
    assert attention.choose(fixed, device, **call) == "xla"
  if call["mask"] == "any":
    with pytest.raises(ValueError, match="needs padding at the end"):
      attention.choose("cudnn", device, **call)
  else:
    assert attention.choose("cudnn", device, **call) == "cudnn"


def test_a_tower_that_the_kernel_cannot_compute_is_refused():
  tower = _with(ODD["distances"][0], attention="tpu")
  with pytest.raises(ValueError, match=r"'tpu' computes .* 2 heads of 8 and 7 tokens with a bias"):
    jax.eval_shape(tower.init, jax.random.key(0), IDS, MASK)


def test_the_devices_of_the_mesh_decide():
  """A program may be compiled for other devices than those of this machine."""
  assert attention.device() == Device("cpu")
  with jax.set_mesh(sharding.make_mesh()):
    assert attention.device() == Device("cpu")
  for platform, kind, expected in [
    ("tpu", "TPU v5 lite", Device("tpu")),
    ("gpu", "NVIDIA H200", AMPERE),
    ("gpu", "AMD Instinct MI300X", AMD),
  ]:
    described = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    mesh = AbstractMesh((4,), ("data",), (AxisType.Auto,), abstract_device=described)
    with jax.sharding.use_abstract_mesh(mesh):
      assert attention.device() == expected


def test_an_unknown_implementation_is_named():
  with pytest.raises(ValueError, match=r"config\.model\.text\.attention.*flash.*auto.*cudnn"):
    TOWERS["text"](**TEXT, attention="flash")


def _with(options, **changes):
  return dataclasses.replace(options, **changes).build()


def _value(tower, params, inputs):
  out = tower.apply(params, *inputs)
  tokens = out.tokens if out.mask is None else jnp.where(out.mask[..., None], out.tokens, 0)
  return jnp.square(out.pooled).sum() + jnp.sin(tokens.astype(jnp.float32)).sum()


def _tokens_of_cudnn(jaxpr):
  """The numbers of tokens of the queries whose gradients cuDNN computes."""
  pattern = r"(?:bf16|f16)\[\d+,(\d+),\d+,\d+\][^\n]*= dot_product_attention_bwd_wrapper"
  return {int(n) for n in re.findall(pattern, str(jaxpr))}


@pytest.mark.parametrize("name", slow_unless(ODD, FAST.__contains__))
def test_cudnn_takes_odd_numbers_of_tokens_and_padding(name, on_a_gpu):  # noqa: F811
  """jax refuses to differentiate cuDNN's attention for odd counts, and refuses masks."""
  options, inputs, count = ODD[name]
  tower = _with(options, attention="cudnn", dtype="bfloat16")
  params = jax.eval_shape(tower.init, jax.random.key(0), *inputs)
  jaxpr = jax.make_jaxpr(jax.grad(functools.partial(_value, tower)))(params, inputs)
  assert _tokens_of_cudnn(jaxpr) == {count}


def _kernel_of_xla(query, key, value, *, key_value_seq_lengths, implementation, **options):
  """cuDNN's attention, computed by XLA; gradients of keys that it may not compute are NaN."""
  assert implementation == "cudnn" and query.shape[1] % 2 == 0 == key.shape[1] % 2

  def plain(query, key, value, bias, lengths):
    return xla(
      query, key, value, bias, key_value_seq_lengths=lengths, implementation="xla", **options
    )

  @jax.custom_vjp
  def kernel(*args):
    return plain(*args)

  def forward(*args):
    out, vjp = jax.vjp(plain, *args)
    return out, (vjp, args[-1])

  def backward(saved, g):
    vjp, lengths = saved
    dq, dk, dv, *others = vjp(g)
    tile = 2 * (jnp.arange(dk.shape[1]) // 2)  # all keys of a tile are computed, or none
    unset = tile[None, :, None, None] >= lengths[:, None, None, None]
    return dq, *(jnp.where(unset, jnp.nan, x) for x in (dk, dv)), *others

  kernel.defvjp(forward, backward)
  return kernel(query, key, value, options.pop("bias"), key_value_seq_lengths)


xla = jax.nn.dot_product_attention


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_what_cudnn_gets_means_the_same(name, monkeypatch):
  """Values and gradients of a tower with cuDNN's arguments, against the plain tower."""
  options, inputs, _ = ODD[name]
  plain = _with(options, attention="xla")
  params = jax.jit(plain.init)(jax.random.key(2), *inputs)
  gradient = jax.value_and_grad(_value, 1)
  expected = jax.jit(functools.partial(gradient, plain))(params, inputs)
  called = []

  def kernel(*args, **options):
    if options["implementation"] == "xla":
      return xla(*args, **options)
    called.append(args[0].shape)
    return _kernel_of_xla(*args, **options)

  monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
  fused = _with(options, attention="cudnn")
  found = jax.jit(functools.partial(gradient, fused))(params, inputs)
  assert called
  found, expected = (jax.flatten_util.ravel_pytree(x)[0] for x in (found, expected))
  # Sums have another order, and some gradients, such as those of key biases, are sums to zero.
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def _of_heads(attend, query, gradient, mask, causal):
  """Result of attention and its gradients; keys and values are queries rolled by a row."""
  args = (query, jnp.roll(query, 1, 0), jnp.roll(query, 2, 1))
  y, vjp = jax.vjp(lambda *args: attend(*args, mask, causal), *args)
  return y, *vjp(gradient)


@pytest.mark.slow
@pytest.mark.parametrize(
  "head,dtype,causal,masked",
  [
    (64, "float32", True, True),
    (32, "float32", False, True),
    (128, "float32", True, False),
    (64, "bfloat16", False, False),
  ],
)
def test_the_kernel_for_tpus_computes_attention(head, dtype, causal, masked):
  """Interpreted on the CPU: 13 tokens, on a mesh whose axis `tensor` splits the heads."""
  shape, tolerance = (4, 13, 256 // head, head), dict(float32=1e-5, bfloat16=0.05)[dtype]
  query, gradient = (jax.random.normal(jax.random.key(i), shape).astype(dtype) for i in (0, 1))
  mask = jnp.arange(13)[None] < jnp.asarray([[1], [4], [7], [13]]) if masked else None

  def plain(query, key, value, mask, causal):
    return attention.attend(query, key, value, mask, causal=causal)

  kernel = functools.partial(tpu_attention.attend, interpret=True)
  expected = jax.jit(functools.partial(_of_heads, plain, causal=causal))(query, gradient, mask)
  with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, tensor=2)):
    found = jax.jit(functools.partial(_of_heads, kernel, causal=causal))(query, gradient, mask)
  for x, y in zip(found, expected):
    assert x.dtype == y.dtype == dtype
    np.testing.assert_allclose(
      x.astype("float32"), y.astype("float32"), rtol=0, atol=tolerance * float(jnp.abs(y).max())
    )


@needs_libtpu
@pytest.mark.parametrize(
  "topology",
  [
    pytest.param("v5e:1x1", marks=pytest.mark.optimized),
    *(
      pytest.param(x, marks=pytest.mark.long)
      for x in ("v4:2x2x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:2x2x1")
    ),
  ],
)
def test_the_kernel_for_tpus_compiles(topology):
  """Attention of B/16 at 224 and 384 pixels and of CLIP's texts, and the gradients."""
  mesh = sharding.make_mesh(devices=topologies.devices(topology))
  rows = sharding.batch_sharding(mesh)
  with jax.set_mesh(mesh):
    for shape, causal in (
      ((8, 197, 12, 64), False),
      ((8, 577, 12, 64), False),
      ((8, 77, 8, 64), True),
    ):
      x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rows)
      mask = jax.ShapeDtypeStruct(shape[:2], jnp.bool_, sharding=rows)
      both = jax.jit(functools.partial(_of_heads, tpu_attention.attend, causal=causal))
      compiled = topologies.compile_without_cache(both.lower(x, x, mask))
      assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2


def _configs(monkeypatch):
  """{name: plain values} of every shipped config, and of the models of benchmarks/gpu.py."""
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):  # set by the scripts
    monkeypatch.setenv(name, "PASSIVE")
  gpu, step = importlib.import_module("gpu"), importlib.import_module("step")
  for name in ("gpu", "step"):
    monkeypatch.delitem(sys.modules, name)
  shipped = (ROOT / "configs").glob("[!_]*.py")
  return {path.stem: load(path.stem).to_dict() for path in shipped} | {
    name: step.values(sizes, **gpu.OPTIONS) for name, sizes in gpu.MODELS.items()
  }


@pytest.mark.slow
def test_every_config_is_traced_for_a_gpu(on_a_gpu, monkeypatch):  # noqa: F811
  """The towers and their gradients, with the sizes of each config: 197, 257, 77 ... tokens."""
  counts, without_sizes = {}, set()
  for name, values in _configs(monkeypatch).items():
    if not all("name" in values["model"].get(side, {}) for side in ("image", "text")):
      without_sizes.add(name)  # they are in the checkpoint
      continue
    config = resolve_config(values, files_needed=False)
    data, model = config.data, config.model.build()
    image = jax.ShapeDtypeStruct((2, data.image_size, data.image_size, 3), jnp.float32)
    ids, mask = (jax.ShapeDtypeStruct((2, data.text_length), x) for x in (jnp.int32, jnp.bool_))
    for side, inputs in dict(image=(image,), text=(ids, mask)).items():
      tower = getattr(model, f"{side}_tower")
      if getattr(tower.options, "attention", None) and tower.options.compute_dtype.itemsize == 2:
        params = jax.eval_shape(tower.init, jax.random.key(0), *inputs)
        jaxpr = jax.make_jaxpr(jax.grad(functools.partial(_value, tower)))(params, inputs)
        counts[name, side] = _tokens_of_cudnn(jaxpr)
  assert without_sizes == {"freeze_align_dinov2l_arl", "lit", "photos_frozen"}
  assert counts["clip_b16", "image"] == {198} and counts["clip_b16", "text"] == {78}
  assert counts["siglip_b16", "image"] == {196} and counts["siglip_b16", "text"] == {64}
  assert counts["L/14", "image"] == counts["So400m/14", "image"] == {258}
  # Its class token follows the padding, so its mask is not a number of tokens.
  assert counts.pop(("coca_l14", "text")) == set()
  assert all(len(tokens) == 1 for tokens in counts.values()), counts
