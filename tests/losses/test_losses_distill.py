"""Losses with teachers or noise probabilities in the batch, against their expected values."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_oracles import (
  FIELDS,
  at,
  both_precisions,
  cases,
  cases2,
  check,
  check2,
  make,
  oracles,
  run,
  run2,
  unit,
)

from bigalign import losses, sharding
from bigalign.losses.engine import pairwise


def parted(got):
  """With the oracle's names of the two parts."""
  return {**got, "hard": got["contrastive_loss"], "soft": got["distill_loss"]}


@both_precisions
@pytest.mark.parametrize("case", cases("clip_distill"))
def test_clip_distill(case, precision):
  options = dict(case["params"])
  loss = make("clip_distill", options | dict(teacher_scales=(options.pop("teacher_scale"),)))
  check(case, parted(run(loss, case, precision)), precision)


@both_precisions
@pytest.mark.parametrize("case", cases("mobileclip_dr"))
def test_mobileclip_dr(case, precision):
  options = dict(case["params"])
  options |= dict(soft_share=options.pop("lambda"), second_text="txt_syn" in case["inputs"])
  check(case, parted(run(make("mobileclip_dr", options), case, precision)), precision)


@both_precisions
@pytest.mark.parametrize("case", cases2("mobileclip_dr"))
def test_mobileclip_dr_with_own_scales_and_two_texts(case, precision):
  two = "txt_syn" in case["inputs"]
  options = dict(soft_share=case["params"]["lambda"], second_text=two)
  options |= dict(teacher_scales=case["params"]["teacher_scales"])
  where = at()._replace(sizes=dict(teachers=case["params"]["teacher_dims"]))

  def value(inputs, scalars, share=options["soft_share"]):
    feats = {"zimg": inputs["img"], "ztxt": inputs["txt"], "ztxt_second": inputs.get("txt_syn")}
    batch = {ours: inputs[k] for k, ours in FIELDS.items() if k in inputs}
    loss = make("mobileclip_dr", options | dict(soft_share=share))
    objective, (_, metrics) = loss.apply({"t": scalars["log_scale"]}, {}, feats, batch, where)
    return objective, metrics

  got = run2(case, precision, value)
  parts = {
    k: run2(case, precision, functools.partial(value, share=x), key=(k,))["loss"]
    for k, x in (("hard", 0.0), ("soft", 1.0))
  }
  check2(case, got | parts, precision, require=("hard", "soft"))


@both_precisions
@pytest.mark.parametrize("case", cases("siglip_distill"))
def test_siglip_distill(case, precision):
  options = dict(case["params"])
  share = options.pop("lambda")
  loss, hard, soft = (
    run(make("siglip_distill", options | dict(soft_share=x)), case, precision)
    for x in (share, 0.0, 1.0)
  )
  check(case, {**loss, "hard": hard["loss"], "soft": soft["loss"]}, precision)


@both_precisions
@pytest.mark.parametrize("case", cases("nitc"))
def test_nitc(case, precision):
  loss = make("nitc", dict(smoothing=case["params"]["lambda"]))
  noise = jnp.asarray(oracles().inputs(case)["noise_prob"], precision)
  check(case, run(loss, case, precision, {"noise_prob": noise}), precision)


def random_batch(size=32, width=16, teacher=24, noise=0.5, seed=0):
  """Features and fields of pairs with similar images and texts, as numpy in float64."""
  rng = np.random.default_rng(seed)

  def pair(width):
    x = rng.normal(size=(size, width))
    y = x + noise * rng.normal(size=x.shape)
    return (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))

  zimg, ztxt = pair(width)
  teacher_img, teacher_txt = pair(teacher)
  second, _ = pair(width)
  feats = dict(zimg=zimg, ztxt=ztxt, ztxt_second=second)
  fields = dict(
    teacher_img=teacher_img,
    teacher_txt=teacher_txt,
    teacher_txt_second=teacher_txt[::-1],
    noise_prob=rng.uniform(size=size),
  )
  return feats, fields


def value_and_gradients(loss, feats, fields, dtype, params=None, engine=pairwise.DEFAULT):
  """{"loss", features and parameters}: the objective and its gradients, as numpy in float64."""
  given = {k: jnp.asarray(x, dtype) for k, x in (params or loss.init({})[0]).items()}
  feats, fields = ({k: jnp.asarray(x, dtype) for k, x in d.items()} for d in (feats, fields))

  @jax.jit
  def both(given, feats, fields):
    def value(given, feats):
      return loss.apply(given, {}, feats, fields, at(engine=engine))[0]

    return jax.value_and_grad(value, (0, 1))(given, feats)

  value, (d_params, d_feats) = both(given, feats, fields)
  return {k: np.asarray(x, np.float64) for k, x in {"loss": value, **d_params, **d_feats}.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
  "name,options",
  [
    ("clip_distill", {}),
    ("mobileclip_dr", dict(second_text=True)),
    ("siglip_distill", {}),
    ("siglip_distill", dict(form="signed")),
    ("nitc", {}),
  ],
)
def test_a_ring_of_devices_gives_the_same(name, options):
  loss, batch = make(name, options), random_batch()
  with jax.enable_x64(True):
    expected = value_and_gradients(loss, *batch, "float64", engine=pairwise.Engine("dense"))
  with jax.set_mesh(sharding.make_mesh(data=4, fsdp=2)):
    engine = pairwise.Engine("ring", tile_mb=1.5e-4)
    found = value_and_gradients(loss, *batch, "float32", engine=engine)
  for key, x in expected.items():
    np.testing.assert_allclose(found[key], x, atol=1e-5 * max(np.abs(x).max(), 1e-3), err_msg=key)


@pytest.mark.parametrize(
  "name,options",
  [
    ("clip_distill", dict(w_hard=0.0, t_init=20.0, teacher_scales=(20.0,))),
    ("mobileclip_dr", dict(t_init=20.0, teacher_scales=(20.0,))),
    (
      "siglip_distill",
      dict(t_init=10.0, b_init=-8.0, teacher_scales=(10.0,), teacher_biases=(-8.0,)),
    ),
  ],
)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name, options):
  feats, fields = random_batch()
  fields |= dict(teacher_img=feats["zimg"], teacher_txt=feats["ztxt"])
  params = {
    k: np.float64(dict(t=np.log(options["t_init"]), b=options.get("b_init"))[k])
    for k in make(name, options).init({})[0]
  }
  with jax.enable_x64(True):
    found = value_and_gradients(make(name, options), feats, fields, "float64", params)
  for key in ("zimg", "ztxt", *params):
    np.testing.assert_allclose(found[key], 0, atol=1e-12, err_msg=key)


@pytest.mark.slow
def test_limits_are_the_plain_losses():
  feats, fields = random_batch()
  clean = dict(fields, noise_prob=np.zeros(32))
  with jax.enable_x64(True):
    one, many = (
      value_and_gradients(make(name, {}), feats, {}, "float64") for name in ("clip", "siglip")
    )
    for name, options, expected in (
      ("clip_distill", dict(w_soft=0.0), one),
      ("mobileclip_dr", dict(soft_share=0.0), one),
      ("nitc", {}, one),
      ("siglip_distill", dict(soft_share=0.0), many),
    ):
      found = value_and_gradients(make(name, options), feats, clean, "float64")
      for key, x in expected.items():
        np.testing.assert_allclose(found[key], x, atol=1e-12, err_msg=f"{name} {key}")


@pytest.mark.parametrize("name", ["nitc", "clip"])
def test_label_smoothing_is_exact_in_bfloat16_for_embeddings_in_a_cone(name):
  """As at the start of training: all embeddings are close to one direction.

  The gradient of the smoothing is a small difference: of the mean text and the own one.
  """
  rng = np.random.default_rng(0)
  z = [unit(jnp.asarray(1 + 0.01 * rng.normal(size=(64, 32)), jnp.float32)) for _ in range(2)]
  batch = {"noise_prob": jnp.asarray(rng.random(64), jnp.float32)}

  def gradient(smoothing, dtype):
    option = "smoothing" if name == "nitc" else "label_smoothing"
    loss = make(name, {option: smoothing, "t_init": 1.0})
    params, state = loss.init({})

    def value(zimg):
      context = at(engine=pairwise.Engine(dtype=dtype))
      return loss.apply(params, state, {"zimg": zimg, "ztxt": z[1]}, batch, context)[0]

    return jax.jit(jax.grad(value))(z[0])

  exact, rounded = (
    gradient(0.5, dtype) - gradient(0.0, dtype) for dtype in ("float32", "bfloat16")
  )
  assert jnp.linalg.norm(rounded - exact) < 1e-3 * jnp.linalg.norm(exact)


@pytest.mark.parametrize(
  "name,field",
  [
    ("clip_distill", "teacher_txt"),
    ("siglip_distill", "teacher_txt"),
    ("mobileclip_dr", "teacher_txt"),
    ("mobileclip_dr", "teacher_txt_second"),
  ],
)
def test_texts_of_a_teacher_are_as_wide_as_its_images(name, field):
  """Else the last dimensions of wider texts would be left out."""
  loss = make(name, dict(second_text=True) if name == "mobileclip_dr" else {})
  z = jnp.eye(4)
  batch = {k: z for k in ("teacher_img", "teacher_txt", "teacher_txt_second")}
  batch[field] = jnp.ones((4, 6))
  with pytest.raises(ValueError, match=rf"add up to 4, but the data's {field} is 6 wide"):
    loss.apply(loss.init({})[0], {}, {"zimg": z, "ztxt": z, "ztxt_second": z}, batch, at())


@pytest.mark.parametrize("name", ["clip_distill", "mobileclip_dr", "nitc"])
def test_saturated_losses_keep_their_digits(name):
  feats, fields = random_batch(size=16, width=7, teacher=7, noise=0.02)
  fields |= dict(noise_prob=np.full(16, 1e-5))
  params = {"t": np.log(100.0)}
  with jax.enable_x64(True):
    exact = value_and_gradients(make(name, {}), feats, fields, "float64", params)
  found = value_and_gradients(make(name, {}), feats, fields, "float32", params)
  assert 1e-6 < exact["loss"] < 1e-3
  assert abs(found["loss"] - exact["loss"]) < 1e-6


@pytest.mark.parametrize(
  "name,options,message",
  [
    (
      "mobileclip_dr",
      dict(teacher_dims=(8, 16), teacher_scales=(100.0,)),
      r"mobileclip_dr\.teacher_scales.*length 2",
    ),
    ("mobileclip_dr", dict(soft_share=1.5), r"mobileclip_dr\.soft_share=1.5"),
    (
      "clip_distill",
      dict(teacher_dims=(8, 16), teacher_scales=(100.0,)),
      r"clip_distill\.teacher_scales.*length 2",
    ),
    (
      "drrho",
      dict(teacher_dims=(8, 16), teacher_scales=(70.0, 0.0)),
      r"drrho\.teacher_scales\[1\]=0.0 must be above 0",
    ),
    ("siglip_distill", dict(teacher_biases=()), r"siglip_distill\.teacher_biases.*length 1"),
    ("siglip_distill", dict(form="kl"), r"siglip_distill\.form.*'kl'.*'bce'"),
    ("nitc", dict(smoothing=2.0), r"nitc\.smoothing=2.0"),
  ],
)
def test_options_that_do_not_fit_are_named(name, options, message):
  with pytest.raises(ValueError, match=message):
    make(name, options)


def test_teachers_of_another_width_are_named():
  loss = make("mobileclip_dr", dict(teacher_dims=(8, 8), teacher_scales=(70.0, 60.0)))
  with pytest.raises(ValueError, match=r"teacher_dims=\[8, 8\] add up to 16.*24 wide"):
    value_and_gradients(loss, *random_batch(), "float32")


SEVERAL = [
  ("clip_distill", dict(texts="per_ordinal")),
  ("mobileclip_dr", dict(texts="per_ordinal")),
  ("siglip_distill", dict(texts="images")),
]


def several_texts(count, kinds=None, seed=1):
  """`random_batch` with `count` texts of each image, and their teachers' embeddings."""
  feats, fields = random_batch()
  rng = np.random.default_rng(seed)
  texts = {
    k: x[:, None] + rng.normal(size=(32, count, x.shape[1]))
    for k, x in (("z", feats["ztxt"]), ("teacher", fields["teacher_txt"]))
  }
  fields = {"teacher_img": fields["teacher_img"], "teacher_txts": unit(texts["teacher"])}
  kinds = np.ones((32, count), np.int32) if kinds is None else kinds
  return {"zimg": feats["zimg"], "ztxts": unit(texts["z"])}, fields, kinds


def with_texts(loss, feats, fields, kinds):
  """(objective, gradients of the features) in float32."""
  params, state = loss.init({})
  feats, fields = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (feats, fields))

  def value(feats):
    batch = fields if kinds is None else fields | {"texts_kind": jnp.asarray(kinds)}
    return loss.apply(params, state, feats, batch, at())[0]

  return jax.jit(jax.value_and_grad(value))(feats)


@pytest.mark.parametrize("name,options", SEVERAL)
def test_distillation_with_one_of_several_texts_is_plain_to_the_bit(name, options):
  feats, fields, kinds = several_texts(1)
  value, grads = with_texts(make(name, options), feats, fields, kinds)
  plain = {"zimg": feats["zimg"], "ztxt": feats["ztxts"][:, 0]}
  teacher = {"teacher_img": fields["teacher_img"], "teacher_txt": fields["teacher_txts"][:, 0]}
  expected, wanted = with_texts(make(name, {}), plain, teacher, None)
  np.testing.assert_array_equal(value, expected)
  np.testing.assert_array_equal(grads["zimg"], wanted["zimg"])
  np.testing.assert_array_equal(grads["ztxts"][:, 0], wanted["ztxt"])


@pytest.mark.slow
@pytest.mark.parametrize("name,options", SEVERAL[1:])
def test_distillation_is_the_mean_over_the_texts_and_ignores_absent_ones(name, options):
  """Texts that only some images have form the loss of those images' texts; by parts of a batch."""
  kinds = np.ones((32, 2), np.int32)
  feats, fields, _ = several_texts(2)
  whole, _ = with_texts(make(name, options), feats, fields, kinds)
  each = [
    with_texts(
      make(name, {}),
      {"zimg": feats["zimg"], "ztxt": feats["ztxts"][:, m]},
      {"teacher_img": fields["teacher_img"], "teacher_txt": fields["teacher_txts"][:, m]},
      None,
    )[0]
    for m in range(2)
  ]
  scale = 1 if name == "siglip_distill" else 2  # by images, or a mean over texts
  np.testing.assert_allclose(whole, sum(each) / scale, rtol=1e-6)
  kinds[5:, 1] = 0
  absent = [
    np.where((kinds == 0)[..., None], np.nan, x) for x in (feats["ztxts"], fields["teacher_txts"])
  ]
  one, two = (
    with_texts(make(name, options), feats | dict(ztxts=z), fields | dict(teacher_txts=t), kinds)
    for z, t in ((feats["ztxts"], fields["teacher_txts"]), absent)
  )
  jax.tree.map(np.testing.assert_array_equal, one, two)
  assert not np.asarray(one[1]["ztxts"])[5:, 1].any() and abs(one[0] - whole) > 1e-4


def test_clip_distill_averages_the_probabilities_of_teachers_with_own_scales():
  """Against numpy; each direction has the softmax of its own."""
  feats, fields = random_batch()
  options = dict(t_init=20.0, teacher_dims=(8, 16), teacher_scales=(70.0, 30.0))

  def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)

  expected = 0.0
  x, y = fields["teacher_img"], fields["teacher_txt"]
  z = 20.0 * feats["zimg"] @ feats["ztxt"].T
  first, second = 70.0 * x[:, :8] @ y[:, :8].T, 30.0 * x[:, 8:] @ y[:, 8:].T
  for logits, teachers in ((z, (first, second)), (z.T, (first.T, second.T))):
    p = sum(map(softmax, teachers)) / 2
    expected -= (p * np.log(softmax(logits))).sum(1).mean() / 2
  with jax.enable_x64(True):
    found = losses.apply_once(
      make("clip_distill", options), *jax.tree.map(jnp.asarray, (feats, fields))
    )
  np.testing.assert_allclose(found["distill_loss"], expected, rtol=1e-6)


@pytest.mark.slow
def test_the_widths_of_teachers_come_from_the_data():
  """And an option that says otherwise is an error; two teachers have the scales of DFNDR."""
  sizes = {"teachers": (8, 16)}
  with pytest.raises(ValueError, match=r"teacher_dims=\(16, 8\), but .*teachers .*\(8, 16\)"):
    make("mobileclip_dr", dict(teacher_dims=(16, 8))).init(sizes)
  with pytest.raises(ValueError, match=r"siglip_distill\.teacher_scales=.* length 2"):
    make("siglip_distill", {}).init(sizes)
  feats, fields = random_batch()
  known = make("mobileclip_dr", dict(teacher_dims=(8, 16), teacher_scales=(70.0, 60.0)))
  expected = value_and_gradients(known, feats, fields, "float32")["loss"]
  found = losses.apply_once(
    make("mobileclip_dr", {}),
    *jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (feats, fields)),
    sizes,
  )
  np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
