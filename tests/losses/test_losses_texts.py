"""Losses with several texts of each image: the second oracles, limits, masks and owners."""

from __future__ import annotations

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_oracles import (
  AT,
  NOT_BUILT,
  ROOT2,
  WHY2,
  both_precisions,
  cases2,
  check2,
  ids,
  make,
  oracles2,
  run2,
  unit,
)

from bigalign import losses


def by_image(texts, owner, images):
  """Flat texts [T, D] with their owners as ([B, M, D], kinds [B, M]): M is the most of an image."""
  owner = np.asarray(owner)
  texts_of = [np.flatnonzero(owner == image) for image in range(images)]
  most = max(len(x) for x in texts_of)
  place = np.stack([np.pad(x, (0, most - len(x)), constant_values=-1) for x in texts_of])
  return texts[np.maximum(place, 0)], (place >= 0).astype(np.int32)


def texts_and_kinds(inputs, owner, images):
  if owner is not None:
    return by_image(inputs["texts"], owner, images)
  return inputs["texts"], (inputs["texts_mask"] != 0).astype(jnp.int32)


def applied(name, options):
  """(inputs, scalars) -> (objective, metrics) of a loss on several texts, see `run2`."""

  def function(case):
    owner = oracles2().inputs(case).get("owner")

    def value(inputs, scalars):
      texts, kind = texts_and_kinds(inputs, owner, len(inputs["img"]))
      params = {"t": scalars["log_scale"]} | ({"b": scalars["bias"]} if "bias" in scalars else {})
      feats, batch = {"zimg": inputs["img"], "ztxts": texts}, {"texts_kind": kind}
      objective, (_, metrics) = make(name, options).apply(params, {}, feats, batch, AT)
      return objective, metrics

    return value

  return function


@both_precisions
@pytest.mark.parametrize("case", cases2("clip_texts"))
def test_clip_with_several_texts(case, precision):
  function = applied("clip", dict(texts=case["params"]["form"]))(case)
  check2(case, run2(case, precision, function), precision, require=("i2t", "t2i"))


@both_precisions
@pytest.mark.parametrize("case", cases2("siglip_texts"))
def test_siglip_with_several_texts(case, precision):
  function = applied("siglip", dict(texts=case["params"]["reduction"]))(case)
  check2(case, run2(case, precision, function), precision)


def random_texts(images=12, count=3, width=8, seed=0, dtype=jnp.float32):
  """Features and fields of images with up to `count` texts, each with at least one positive."""
  rng = np.random.default_rng(seed)
  img = rng.normal(size=(images, width))
  texts = img[:, None] + rng.normal(size=(images, count, width))
  kinds = rng.integers(0, 3, (images, count))
  kinds[:, 0] = 1
  feats = {"zimg": unit(img), "ztxts": unit(texts)}
  return {k: jnp.asarray(x, dtype) for k, x in feats.items()}, {"texts_kind": jnp.asarray(kinds)}


def graded(loss, feats, batch, sizes=None):
  """(objective, metrics), and the gradients by features and scalars."""
  params, state = loss.init(sizes or {})

  def value(params, feats):
    return loss.apply(params, state, feats, batch, AT)

  (objective, (_, metrics)), grads = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))(
    params, feats
  )
  return objective, metrics, grads


@pytest.mark.parametrize(
  "name,values",
  [("clip", ("uniform", "sum_inside", "per_ordinal")), ("siglip", ("texts", "images"))],
)
def test_one_text_in_any_form_is_the_plain_loss_to_the_bit(name, values):
  feats, batch = random_texts(count=1)
  plain = {"zimg": feats["zimg"], "ztxt": feats["ztxts"][:, 0]}
  value, metrics, (d_params, d_feats) = graded(make(name, {}), plain, {})
  for texts in values:
    found, logs, (d_params2, d_feats2) = graded(make(name, dict(texts=texts)), feats, batch)
    np.testing.assert_array_equal(found, value)
    jax.tree.map(np.testing.assert_array_equal, logs, metrics)
    jax.tree.map(np.testing.assert_array_equal, d_params2, d_params)
    np.testing.assert_array_equal(d_feats2["zimg"], d_feats["zimg"])
    np.testing.assert_array_equal(d_feats2["ztxts"][:, 0], d_feats["ztxt"])


LOSSES = [
  ("clip", dict(texts="uniform")),
  ("clip", dict(texts="sum_inside")),
  ("clip", dict(texts="per_ordinal")),
  ("siglip", dict(texts="pairs")),
]


@pytest.mark.parametrize("name,options", LOSSES, ids=str)
def test_an_absent_text_has_no_effect_and_no_gradient(name, options):
  """Whatever the vector is, also one that is not finite."""
  feats, batch = random_texts()
  absent = np.asarray(batch["texts_kind"] == 0)
  assert absent.any()
  other = {**feats, "ztxts": jnp.where(absent[..., None], jnp.nan, feats["ztxts"])}
  one, two = (graded(make(name, options), x, batch) for x in (feats, other))
  jax.tree.map(np.testing.assert_array_equal, one, two)
  assert not np.asarray(one[2][1]["ztxts"])[absent].any()


@pytest.mark.parametrize("name,options", LOSSES, ids=str)
def test_the_order_of_images_and_of_texts_does_not_matter(name, options):
  feats, batch = random_texts()
  rng = np.random.default_rng(1)
  # The texts of all images in one other order: a form by ordinals compares the same ones.
  images, texts = rng.permutation(12), rng.permutation(3)
  feats2 = {"zimg": feats["zimg"][images], "ztxts": feats["ztxts"][images][:, texts]}
  batch2 = {"texts_kind": batch["texts_kind"][images][:, texts]}
  value, _, _ = graded(make(name, options), feats, batch)
  np.testing.assert_allclose(graded(make(name, options), feats2, batch2)[0], value, rtol=1e-6)


def test_of_hard_negatives_only_images_see_more_candidates():
  """As a formula of numpy: each positive text among all positives and hard negatives."""
  feats, batch = random_texts()
  _, metrics, _ = graded(make("clip", dict(texts="uniform", t_init=10.0)), feats, batch)
  x, y, kind = (np.asarray(v, np.float64) for v in (*feats.values(), batch["texts_kind"]))
  z = 10 * np.einsum("ie,jme->ijm", x, y)
  i2t, t2i = [], []
  for i in range(12):
    candidates = np.concatenate([z[i][kind == 1], z[i][kind == 2]])
    own = z[i, i][kind[i] == 1]
    i2t.append(np.log(np.exp(candidates).sum()) - own.mean())
    t2i += [np.log(np.exp(z[:, i, m]).sum()) - z[i, i, m] for m in range(3) if kind[i, m] == 1]
  np.testing.assert_allclose(metrics["i2t"], np.mean(i2t), rtol=1e-5)
  np.testing.assert_allclose(metrics["t2i"], np.mean(t2i), rtol=1e-5)


def with_ids(batch, images=12):
  """Labels, and the ids of images; the texts' own ids are those of the images."""
  rows = ids(np.arange(images) + 3)
  label = jnp.asarray(np.arange(images) % 4 - 1)
  return {**batch, "image_id": rows, "text_id": rows, "label": label}


def of_teacher(images=12, count=3, width=5, dtype=jnp.float32):
  """The embeddings of a teacher for images and texts; teacher_txt are those of the first texts."""
  rng = np.random.default_rng(7)
  texts = jnp.asarray(unit(rng.normal(size=(images, count, width))), dtype)
  image = jnp.asarray(unit(rng.normal(size=(images, width))), dtype)
  return {"teacher_img": image, "teacher_txts": texts, "teacher_txt": texts[:, 0]}


TABLES = {"image": 20, "text": 20}


@pytest.mark.parametrize(
  "name,texts,options",
  [
    ("unicl", "uniform", {}),
    ("sogclr", "set", {}),
    pytest.param("isogclr", "set", {}, marks=pytest.mark.slow),
    ("fastclip_v0", "set", {}),
    ("fastclip_v1", "set", {}),
    pytest.param("fastclip_v2", "set", {}, marks=pytest.mark.slow),
    ("fastclip_v3", "set", {}),
    ("drrho", "set", dict(tau=0.1, tau_learned=True, w_distill=0.5)),
    ("drrho", "set", dict(tau=0.1, gamma=0.5)),
  ],
)
def test_one_of_several_texts_is_the_plain_loss_to_the_bit(name, texts, options):
  feats, batch = random_texts(count=1)
  batch = with_ids(batch) | of_teacher(count=1)
  plain = {"zimg": feats["zimg"], "ztxt": feats["ztxts"][:, 0]}
  value, metrics, (slopes, grads) = graded(make(name, options), plain, batch, TABLES)
  several = make(name, options | dict(texts=texts))
  found, logs, (slopes2, grads2) = graded(several, feats, batch, TABLES)
  np.testing.assert_array_equal(found, value)
  jax.tree.map(np.testing.assert_array_equal, (logs, slopes2), (metrics, slopes))
  np.testing.assert_array_equal(grads2["zimg"], grads["zimg"])
  np.testing.assert_array_equal(grads2["ztxts"][:, 0], grads["ztxt"])


def exponents(zimg, ztxts, kinds, tau):
  """(A / tau, which of them count, the axes without anchors) of images and of sets of texts."""
  z = jnp.einsum("ie,jme->ijm", zimg, ztxts)
  own = jnp.einsum("iim->im", z)
  positive, other = kinds == 1, ~np.eye(len(zimg), dtype=bool)
  candidates = (other[..., None] & positive[None]) | (kinds == 2)[None]  # of image i: [k, m]
  of_images = (z[:, :, :, None] - own[:, None, None, :]) / tau  # [i, k, m, p]
  chosen = candidates[..., None] & positive[:, None, None, :]
  of_texts = (z - own[None]) / tau  # [k, i, p]
  return [(of_images, chosen, (1, 2, 3)), (of_texts, other[..., None] & positive[None], (0, 2))]


def log_means(*of):
  """[B] and [B]: log g of images and of sets of texts, as they are defined; see `exponents`."""
  return [jax.nn.logsumexp(a, axis, where=x) - np.log(x.sum(axis)) for a, x, axis in exponents(*of)]


@pytest.mark.slow
def test_global_contrast_of_sets_is_the_gradient_of_its_definition():
  """With gamma 1: tau times the mean log g of both sides; of v3 the temperature's, too."""
  with jax.enable_x64(True):
    feats, batch = random_texts(images=6, dtype=jnp.float64)
    kinds, batch = np.asarray(batch["texts_kind"]), with_ids(batch, 6)

    def objective(feats, t):
      tau = jnp.exp(-t)
      both = log_means(feats["zimg"], feats["ztxts"], kinds, tau)
      return sum(x.mean() for x in both), tau

    tau = 0.2
    t = jnp.asarray(-np.log(tau))
    _, logs, (_, grads) = graded(
      make("sogclr", dict(tau=tau, gamma=1.0, texts="set")), feats, batch, TABLES
    )
    expected = jax.grad(lambda x: tau * objective(x, t)[0])(feats)
    np.testing.assert_allclose(logs["objective"], tau * objective(feats, t)[0], rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), grads, expected)

    options = dict(tau_init=tau, tau_gradient="consistent", rho=3.0, eps=0.0, texts="set")
    _, logs, (slope, _) = graded(make("fastclip_v3", options), feats, batch, TABLES)

    def robust(t):
      entropy, tau = objective(feats, t)
      return tau / 2 * (entropy + 2 * 3.0)

    np.testing.assert_allclose(logs["objective"], robust(t), rtol=1e-6)  # "t" is float32
    np.testing.assert_allclose(slope["t"], jax.grad(robust)(t), rtol=1e-5)


@pytest.mark.slow
def test_drrho_of_sets_is_the_gradient_of_its_definition():
  """As above, of the cosines minus those of the reference; a factor of the release remains."""
  with jax.enable_x64(True):
    tau, size = 0.2, 6
    feats, batch = random_texts(images=size, dtype=jnp.float64)
    teacher = of_teacher(size, dtype=jnp.float64)
    kinds = np.asarray(batch["texts_kind"])

    def both(feats):
      """S - R as the products of longer vectors."""
      img = jnp.concatenate([feats["zimg"], teacher["teacher_img"]], -1)
      txt = jnp.concatenate([feats["ztxts"], -teacher["teacher_txts"]], -1)
      return img, txt, kinds, tau

    def entropy(feats):
      """The mean of log u; the release divides by B for B - 1."""
      return sum((x + np.log((size - 1) / size)).mean() for x in log_means(*both(feats)))

    loss = make("drrho", dict(tau=tau, eps=1e-300, rho=3.0, texts="set"))
    _, logs, (_, grads) = graded(loss, feats, batch | teacher)
    expected = jax.grad(lambda x: tau * entropy(x) * size / (size - 1))(feats)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), grads, expected)
    pull = sum(
      (jax.nn.softmax(a, axes, where=x) * jnp.where(x, a, 0)).sum(axes).mean()
      for a, x, axes in exponents(*both(feats))
    )
    value = tau * (pull * size / (size - 1) + 3.0 + entropy(feats) / 2)
    np.testing.assert_allclose(logs["loss"], value, rtol=1e-10)

    absent = kinds == 0
    assert absent.any()
    broken = {"ztxts": jnp.where(absent[..., None], jnp.nan, feats["ztxts"])}
    theirs = {"teacher_txts": jnp.where(absent[..., None], jnp.nan, teacher["teacher_txts"])}
    _, _, (_, found) = graded(loss, feats | broken, batch | teacher | theirs)
    jax.tree.map(np.testing.assert_array_equal, found, grads)
    assert not np.asarray(grads["ztxts"])[absent].any()


def test_unicl_of_several_texts_spreads_the_target_over_texts_with_the_label():
  feats, batch = random_texts()
  batch = with_ids(batch)
  _, logs, _ = graded(make("unicl", dict(texts="uniform", t_init=10.0)), feats, batch)
  x, y, kind, label = (
    np.asarray(v) for v in (*feats.values(), batch["texts_kind"], batch["label"])
  )
  z = 10 * np.einsum("ie,jme->ijm", np.asarray(x, np.float64), y)
  same = (label[:, None] == label[None]) & (label >= 0)[:, None] | np.eye(12, dtype=bool)
  i2t, t2i = [], []
  for i in range(12):
    candidates = np.concatenate([z[i][kind == 1], z[i][kind == 2]])
    chosen = z[i][(kind == 1) & same[i][:, None]]
    i2t.append(np.log(np.exp(candidates).sum()) - chosen.mean())
    for m in range(3):
      if kind[i, m] == 1:
        t2i.append(np.log(np.exp(z[:, i, m]).sum()) - z[same[i], i, m].mean())
  np.testing.assert_allclose(logs["i2t"], np.mean(i2t), rtol=1e-5)
  np.testing.assert_allclose(logs["t2i"], np.mean(t2i), rtol=1e-5)


@pytest.mark.parametrize("reduction", ["mean_all", "row_sum"])
def test_sail_of_one_text_is_siglip_to_the_bit(reduction):
  """SAIL's own form has two texts; of one, it is the sigmoid loss."""
  feats, batch = random_texts(count=1)
  value, logs, (slopes, grads) = graded(
    make("sail", dict(reduction=reduction, texts="all")), feats, batch
  )
  plain = {"zimg": feats["zimg"], "ztxt": feats["ztxts"][:, 0]}
  siglip = make("siglip", dict(t_init=20.0, b_init=-10.0, t_max=100.0, reduction=reduction))
  expected, metrics, (slopes2, grads2) = graded(siglip, plain, {})
  del metrics["contrastive_loss"]
  grads["ztxt"] = grads.pop("ztxts")[:, 0]
  jax.tree.map(
    np.testing.assert_array_equal,
    (value, logs, slopes, grads),
    (expected, metrics, slopes2, grads2),
  )


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean_all", "row_sum"])
def test_sail_of_two_texts_in_a_list_is_sail(reduction):
  feats, _ = random_texts(count=2)
  two = {"zimg": feats["zimg"], "ztxt": feats["ztxts"][:, 0], "ztxt_second": feats["ztxts"][:, 1]}
  kinds = {"texts_kind": jnp.ones((12, 2), jnp.int32)}
  loss, other = (make("sail", dict(reduction=reduction, texts=x)) for x in ("two", "all"))
  expected = losses.apply_once(loss, two)["loss"]
  np.testing.assert_allclose(losses.apply_once(other, feats, kinds)["loss"], expected, rtol=1e-6)


@pytest.mark.parametrize(
  "name,options,message",
  [
    ("clip", dict(texts="all"), r"clip\.texts: unknown 'all'"),
    ("clip", dict(texts="uniform", label_smoothing=0.1), r"clip\.label_smoothing=0.1 .*one text"),
    (
      "siglip",
      dict(texts="pairs", reduction="mean_all"),
      r"siglip\.reduction='mean_all' .*divisor",
    ),
  ],
)
def test_options_that_do_not_go_together_are_named(name, options, message):
  with pytest.raises(ValueError, match=r"config\.loss\." + message):
    make(name, options)


def test_a_loss_of_several_texts_names_the_option_of_the_data():
  loss = losses.make_loss({"clip": {"texts": "uniform"}})
  with pytest.raises(ValueError, match=r"needs 'texts'.*'ztxts'.*Set config\.data\.texts"):
    losses.check_needs(loss, {"zimg", "ztxt"})


@pytest.mark.skipif(not ROOT2, reason=WHY2)
def test_the_losses_of_losses2_without_a_test_are_those_of_the_list():
  tests = "".join(path.read_text() for path in pathlib.Path(__file__).parents[1].rglob("test_*.py"))
  calls = re.findall(r"cases2\(([^)]*)\)", tests)
  tested = {name for call in calls for name in re.findall(r'"(\w+)"', call)}
  names = {case["loss"] for case in oracles2().cases()}
  assert names - tested - {*NOT_BUILT} == set() == tested & {*NOT_BUILT}
