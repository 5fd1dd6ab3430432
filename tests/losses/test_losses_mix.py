"""Softmax losses with more terms: intra-modal, focal, labelled, mixed, nested; oracles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_oracles import AT, both_precisions, cases, check, floats, make, oracles, run, unit

from bigalign import losses, sharding, sphere
from bigalign.losses.base import Loss
from bigalign.losses.engine.pairwise import DEFAULT
from bigalign.losses.m3co import draw, mixed_direction, permuted
from bigalign.losses.mixup import mixture


def compare(loss, case, precision):
  """Value, gradients and the parts that the case names."""
  got = run(loss, case, precision)
  if "contrastive_loss" in got:
    got["clip"] = got["contrastive_loss"]
  missing = set(case["expect"]) - set(got)
  assert not missing, f"{case['id']}: {sorted(missing)} of the case is not among {sorted(got)}"
  check(case, got, precision)


@both_precisions
@pytest.mark.parametrize(
  "case", [c for k in ("cyclip", "clip_intra_neg", "focal_itc", "sail", "unicl") for c in cases(k)]
)
def test_options_are_those_of_the_case(case, precision):
  compare(make(case["loss"], case["params"]), case, precision)


@both_precisions
@pytest.mark.parametrize("case", cases("clip_gap"))
def test_clip_gap(case, precision):
  compare(make("clip_gap", {**case["params"], "t_learned": True}), case, precision)


@both_precisions
@pytest.mark.parametrize("case", cases("alignclip"))
def test_alignclip(case, precision):
  flags = {k: bool(case["params"][k]) for k in ("separate_text", "separate_image")}
  compare(make("alignclip", case["params"] | flags), case, precision)


@both_precisions
@pytest.mark.parametrize("case", cases("matryoshka"))
def test_matryoshka(case, precision):
  options = dict(case["params"])
  assert options.pop("renormalize"), "every prefix has unit norm"
  compare(make("matryoshka", options), case, precision)


@both_precisions
@pytest.mark.parametrize("case", cases("m3mix"))
def test_m3mix(case, precision):
  options = case["params"]
  names = dict(v="v", l="l", vl="vl", m2="m")

  def apply(params, state, feats, batch, context):
    shares = {ours: options[f"lam_{k}"] for ours, k in names.items()}
    weights = {ours: options[f"w_{k}"] for ours, k in names.items()}
    loss, parts = mixture(
      feats["zimg"],
      feats["ztxt"],
      jnp.exp(params["t"]),
      shares,
      weights,
      tau2=options["tau2"],
      m2_average=options["m2_average"],
      engine=context.engine,
    )
    return loss, (state, {"loss": loss, **parts})

  compare(Loss(frozenset(), None, apply), case, precision)


@both_precisions
@pytest.mark.parametrize("case", cases("m3co"))
def test_m3co(case, precision):
  drawn = floats(oracles().inputs(case), precision)

  def apply(params, state, feats, batch, context):
    img, txt = feats["raw_img"], feats["raw_txt"]
    scale = jnp.asarray(1 / case["params"]["tau"], img.dtype)
    parts = {
      f"{k}_mix": mixed_direction(
        a, c, drawn[f"lam_{k}"], drawn[f"perm_{k}"], scale, engine=context.engine
      )
      for k, a, c in (("img", img, txt), ("txt", txt, img))
    }
    loss = sum(parts.values())
    return loss, (state, {"loss": loss, **parts})

  compare(Loss(frozenset(), None, apply), case, precision)


@both_precisions
@pytest.mark.parametrize("case", cases("softclip_m3co"))
def test_softclip_m3co(case, precision):
  compare(make("softclip_m3co", case["params"]), case, precision)


def pairs(n=12, width=16, noise=0.5, seed=0, dtype=np.float64):
  """Features of n matched pairs, the second caption and the fields of the batch."""
  draw = np.random.default_rng(seed).normal
  img, *texts = (draw(size=(n, width)) for _ in range(3))
  first, second = (img + noise * x for x in texts)
  raw = {"raw_img": 3 * img, "raw_txt": 2 * first}
  unit_norm = {"zimg": unit(img), "ztxt": unit(first), "ztxt_second": unit(second)}
  batch = {"teacher_txt": unit(draw(size=(n, 5))), "label": -jnp.ones(n, jnp.int32)}
  return tuple(
    {k: jnp.asarray(x, dtype if x.dtype.kind == "f" else None) for k, x in fields.items()}
    for fields in (raw | unit_norm, batch)
  )


def value(loss, feats, batch=None, params=None, context=AT):
  """The logged value and the gradient for the pairs, both modalities."""
  params = params or {"t": jnp.log(10.0).astype(feats["zimg"].dtype), "b": jnp.asarray(-3.0)}

  def objective(raw):
    z = {"zimg": unit(raw["raw_img"]), "ztxt": unit(raw["raw_txt"])}
    return loss.apply(params, {}, feats | raw | z, batch or {}, context)

  raw = {k: feats[k] for k in ("raw_img", "raw_txt")}
  (total, (_, metrics)), gradient = jax.value_and_grad(objective, has_aux=True)(raw)
  np.testing.assert_array_equal(total, metrics["loss"])
  return metrics["loss"], gradient


def scaled(x, factor):
  return jax.tree.map(lambda a: factor * a, x)


@pytest.mark.slow
@pytest.mark.parametrize(
  "name,options,factor",
  [
    ("focal_itc", dict(gamma=0.0), 1),
    ("unicl", {}, 1),  # all labels are -1
    ("clip_intra_neg", dict(w_img=0.0, w_txt=0.0), 1),
    ("matryoshka", dict(dims=(16,)), 1),
    ("alignclip", dict(beta=0.0), 2),
    ("alignclip", dict(separate_text=False, separate_image=False), 2),
    ("cyclip", dict(l_in=0.0, l_cross=0.0), 1),
    ("clip_gap", dict(w_uniform=0.0, w_align=0.0, w_xuniform=0.0, t_learned=True), 1),
    ("m2mix", dict(w_m=0.0, t_learned=True), 1),
  ],
)
def test_without_what_it_adds_a_loss_is_clip(name, options, factor):
  with jax.enable_x64(True):
    feats, batch = pairs()
    got = value(make(name, options), feats, batch)
    expected = scaled(value(make("clip", {}), feats), factor)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), got, expected
    )


@pytest.mark.slow
def test_sail_row_sum_is_the_sum_of_siglip_over_both_kinds():
  with jax.enable_x64(True):
    feats, _ = pairs()
    rows, _ = value(make("sail", dict(reduction="row_sum")), feats)
    mean, _ = value(make("sail", {}), feats)
    np.testing.assert_allclose(rows, 2 * 12 * mean, rtol=1e-12)
    params = {"t": jnp.log(10.0), "b": jnp.asarray(-3.0)}
    each = [
      make("siglip", {}).apply(params, {}, {"zimg": feats["zimg"], "ztxt": feats[k]}, {}, AT)[0]
      for k in ("ztxt", "ztxt_second")
    ]
    np.testing.assert_allclose(rows, sum(each), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
  "name,options",
  [
    ("focal_itc", dict(gamma=0.5)),
    ("unicl", {}),
    ("clip_intra_neg", dict(w_img=0.1)),
    ("cyclip", {}),
    ("alignclip", {}),
    ("clip_gap", dict(t_learned=True, w_uniform=0.0, w_align=0.0, w_xuniform=0.0)),
    ("matryoshka", dict(dims=(32, 64))),
    ("softclip_m3co", dict(tau=0.01)),
  ],
)
def test_saturated(name, options):
  """A scale of 100, at which logits are exact to 1e-5 and the loss is below 1e-3."""

  def at(dtype):
    with jax.enable_x64(dtype == np.float64):
      feats, batch = pairs(32, 64, 1.95, dtype=dtype)
      params = {"t": jnp.log(jnp.asarray(100.0, dtype))}
      # The unit norms themselves are float32's.
      feats = {k: jnp.asarray(np.asarray(x, np.float32), dtype) for k, x in feats.items()}
      logs = make(name, options).apply(params, {}, feats, batch, AT)[1][1]
      return {k: np.asarray(x) for k, x in logs.items()}

  exact, got = at(np.float64), at(np.float32)
  small = {k: x for k, x in exact.items() if 3e-6 < abs(x) < 1e-3}
  assert small, exact
  for k, x in small.items():
    np.testing.assert_allclose(got[k], x, rtol=0, atol=1e-6, err_msg=k)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_mixture_of_one_is_clip_also_when_saturated(share):
  """Share 1 or 0: the same pairs, perhaps in another order."""
  feats, _ = pairs(32, 64, 1.95, dtype=np.float32)
  shares = dict.fromkeys(("v", "l"), share)
  _, parts = mixture(
    feats["zimg"],
    feats["ztxt"],
    jnp.asarray(100.0),
    shares,
    shares,
    tau2=None,
    m2_average=False,
    engine=DEFAULT,
  )
  x, y = (np.asarray(feats[k], np.float64) for k in ("zimg", "ztxt"))
  with jax.enable_x64(True):
    exact = (
      cross_entropy(np.eye(32), 100 * x @ y.T) + cross_entropy(np.eye(32), 100 * y @ x.T)
    ) / 2
  assert 1e-5 < exact < 1e-3
  for name in parts:
    np.testing.assert_allclose(parts[name], exact, rtol=0, atol=1e-6, err_msg=name)


def cross_entropy(targets, logits):
  return -np.mean(np.sum(targets * np.asarray(jax.nn.log_softmax(logits)), -1))


@pytest.mark.slow
def test_an_odd_batch_mixes_its_middle_with_itself():
  with jax.enable_x64(True):
    feats, _ = pairs(7)
    x, y = (np.asarray(feats[k]) for k in ("zimg", "ztxt"))
    shares = dict(v=0.3, l=0.6, vl=0.2, m2=0.9)

    def geo(a, b, share):
      angle = np.arccos(np.clip(np.sum(a * b, -1, keepdims=True), -1, 1 - 1e-12))
      return (np.sin(share * angle) * a + np.sin((1 - share) * angle) * b) / np.sin(angle)

    def both(targets, a, c):
      return (cross_entropy(targets, 20 * a @ c.T) + cross_entropy(targets.T, 20 * c @ a.T)) / 2

    eye, turned = np.eye(7), np.eye(7)[::-1]
    expected = {
      "v": both(0.3 * eye + 0.7 * turned, geo(x, x[::-1], 0.3), y),
      "l": both(0.6 * eye + 0.4 * turned, x, geo(y, y[::-1], 0.6)),
      "vl": both(eye + turned, geo(x, x[::-1], 0.2), geo(y, y[::-1], 0.2)),
    }
    scale, weights = jnp.asarray(20.0), dict.fromkeys(shares, 1.0)

    def mixed(x, y):
      return mixture(x, y, scale, shares, weights, tau2=None, m2_average=False, engine=DEFAULT)

    args = jnp.asarray(x), jnp.asarray(y)
    (_, parts), gradient = jax.value_and_grad(mixed, (0, 1), has_aux=True)(*args)
    for name, expected_value in expected.items():
      np.testing.assert_allclose(parts[name], expected_value, rtol=1e-6, err_msg=name)
    assert all(np.isfinite(g).all() for g in gradient)


@pytest.mark.slow
def test_pairs_mixed_to_texts_only_leave_one_direction_of_clip():
  """Share 0: the mixture is the text, so that images and texts are both compared with texts."""
  with jax.enable_x64(True):
    feats, _ = pairs()
    x, y, scale = feats["zimg"], feats["ztxt"], jnp.asarray(20.0)
    _, parts = mixture(
      x, y, scale, {"m2": 0.0}, {"m2": 1.0}, tau2=None, m2_average=False, engine=DEFAULT
    )
    own = jnp.sum(x * y, -1)
    among_texts = scale * jnp.where(jnp.eye(12, dtype=bool), own[:, None], y @ y.T)
    expected = cross_entropy(np.eye(12), scale * x @ y.T) + cross_entropy(np.eye(12), among_texts)
    np.testing.assert_allclose(parts["m2"], expected, rtol=1e-12)


@pytest.mark.parametrize("angle", [0.0, 1e-7, 1e-3, 2e-3])
def test_a_short_arc_has_a_finite_gradient(angle):
  a = jnp.asarray([[1.0, 0.0, 0.0]])
  b = jnp.asarray([[np.cos(angle), np.sin(angle), 0.0]], jnp.float32)
  middle, gradient = jax.value_and_grad(
    lambda a, b: sphere.geodesic(a, b, jnp.asarray(0.25))[0, 1], (0, 1)
  )(a, b)
  np.testing.assert_allclose(middle, 0.75 * angle, rtol=1e-3, atol=1e-7)
  np.testing.assert_allclose([g[0, 1] for g in gradient], [0.25, 0.75], rtol=1e-3)


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-13])
def test_an_embedding_without_a_direction_has_no_gradient(length):
  """A slope of 1e12 would take over the update of all other rows."""
  x = jnp.zeros((3, 4)).at[0].set(length / 2).at[1, 0].set(3.0).at[2, 1].set(2e-12)
  way = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
  gradient = jax.grad(lambda x: (sphere.unit(x) * way).sum())(x)
  np.testing.assert_array_equal(sphere.unit(x)[0], 0)
  np.testing.assert_array_equal(gradient[0], 0)
  np.testing.assert_array_equal(sphere.unit(x)[1:], np.eye(4)[:2])
  np.testing.assert_allclose(gradient[1], np.asarray(way[1] / 3).copy() * [0, 1, 1, 1], rtol=1e-6)
  assert jnp.isnan(sphere.unit(x.at[0, 0].set(jnp.nan))[0]).all(), "a failure is not hidden"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["m2mix", "m3mix", "m3co"])
def test_mixtures_are_drawn_from_the_step_alone(name):
  feats, _ = pairs(dtype=np.float32)
  loss = make(name, {})
  keys = [AT.key, AT.key, jax.random.key(1)]
  first, again, other = (loss.apply({}, {}, feats, {}, AT._replace(key=key))[0] for key in keys)
  np.testing.assert_array_equal(first, again)
  assert abs(first - other) > 1e-5


@pytest.mark.slow
def test_mixtures_fade_with_the_epochs():
  feats, _ = pairs(dtype=np.float32)
  later = AT._replace(epochs=jnp.asarray(3.9))
  logs = [
    make("m2mix", dict(decay=decay)).apply({}, {}, feats, {}, later)[1][1]
    for decay in (False, True)
  ]
  whole, quarter = (x["loss"] - x["contrastive_loss"] for x in logs)
  np.testing.assert_allclose(quarter, whole / 4, rtol=1e-4)


@pytest.mark.slow
def test_m3co_hands_over_to_soft_targets():
  feats, _ = pairs(dtype=np.float32)

  def at(progress, name="m3co", **options):
    context = AT._replace(progress=jnp.asarray(progress))
    return make(name, options).apply({}, {}, feats, {}, context)[0]

  soft, mixed = at(0.0, "softclip_m3co"), at(0.0, soft_after=None)
  np.testing.assert_allclose(at(0.4), soft, rtol=1e-6)
  np.testing.assert_allclose(at(0.3), mixed, rtol=1e-6)
  np.testing.assert_array_equal(at(0.9, soft_after=None), mixed)


@pytest.mark.slow
def test_detached_targets_have_the_value_and_no_gradient():
  with jax.enable_x64(True):
    feats, _ = pairs()
    free, kept = (
      value(make("softclip_m3co", dict(detach_targets=detach)), feats) for detach in (False, True)
    )
    np.testing.assert_allclose(free[0], kept[0], rtol=1e-12)
    x, y = (jnp.asarray(unit(feats[k])) for k in ("raw_img", "raw_txt"))

    def by_hand(raw):
      a, c = unit(raw["raw_img"]), unit(raw["raw_txt"])
      logits, log_p = 8 * a @ c.T, jax.nn.log_softmax
      targets = [jax.nn.softmax(8 * z @ z.T) for z in (x, y)]
      return -sum((t * (log_p(z))).sum(-1).mean() / 2 for t in targets for z in (logits, logits.T))

    expected = jax.grad(by_hand)({k: feats[k] for k in ("raw_img", "raw_txt")})
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13), kept[1], expected
    )
    assert abs(free[1]["raw_img"] - kept[1]["raw_img"]).max() > 1e-4


@pytest.mark.slow
def test_a_permutation_within_shards_moves_nothing_between_them():
  mesh = sharding.make_mesh(data=4, fsdp=2)
  rows = sharding.batch_sharding(mesh)
  x = jax.device_put(np.arange(64.0, dtype=np.float32).reshape(32, 2), rows)
  _, partner = draw(jax.random.key(0), 32, alpha=0.15, probability=0.5, parts=8)
  np.testing.assert_array_equal(np.sort(partner), np.arange(32))
  np.testing.assert_array_equal(partner // 4, np.arange(32) // 4)
  with jax.set_mesh(mesh):
    program = jax.jit(lambda x, i: permuted(x, i, 8), out_shardings=rows)
    program = program.lower(x, partner).compile()
    np.testing.assert_array_equal(program(x, partner), np.asarray(x)[partner])
  for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
    assert f" {collective}(" not in program.as_text()


@pytest.mark.slow
def test_scope_shard_runs_on_a_mesh_of_any_size():
  loss = make("m3co", dict(perm_scope="shard"))
  feats, _ = pairs(32, dtype=np.float32)
  with jax.set_mesh(sharding.make_mesh(data=8)):
    split = jax.jit(lambda feats: loss.apply({}, {}, feats, {}, AT)[0])(feats)
  alone = loss.apply({}, {}, feats, {}, AT)[0]
  whole = make("m3co", {}).apply({}, {}, feats, {}, AT)[0]
  np.testing.assert_array_equal(alone, whole)  # one device: the shard is the batch
  assert abs(split - whole) > 1e-5


@pytest.mark.slow
def test_half_of_the_samples_are_mixed_with_shares_near_the_ends():
  share, partner = draw(jax.random.key(1), 4000, alpha=0.15, probability=0.5, parts=1)
  assert 0.45 < (share < 1).mean() < 0.55
  np.testing.assert_array_equal(np.sort(partner), np.arange(4000))
  # Beta(0.15, 0.15) has the variance 1 / (4 (2 * 0.15 + 1)).
  np.testing.assert_allclose(share[share < 1].var(), 1 / 5.2, rtol=0.1)


def test_each_width_has_its_own_state_and_scalars(monkeypatch):
  def counting():
    """A loss whose state adds up the widths to which it is applied."""

    def apply(params, state, feats, batch, context):
      widths = state["widths"] + feats["zimg"].shape[1]
      objective = params["t"] * feats["zimg"][0, 0]
      return objective, ({"widths": widths}, {"loss": 10 * objective})

    def init(sizes):
      return {"t": jnp.asarray(5.0)}, {"widths": jnp.zeros(())}

    return Loss(frozenset({"ids"}), init, apply, lambda p, _: {"t": jnp.minimum(p["t"], 1.0)})

  monkeypatch.setitem(losses.LOSSES, "counting", counting)
  options = dict(base="counting", dims=(4, 16), weights=(0.25, 0.75), shared=False)
  loss = make("matryoshka", options)
  assert loss.needs == {"ids", "raw"}
  params, state = loss.init({})
  assert set(params) == set(state) == {"d4", "d16"}
  params = loss.constrain(params, params)
  np.testing.assert_array_equal(params["d16"]["t"], 1.0)
  feats, _ = pairs(dtype=np.float32)
  for n in (1, 2):
    objective, (state, metrics) = loss.apply(params, state, feats, {}, AT)
    assert {k: float(s["widths"]) for k, s in state.items()} == {"d4": 4 * n, "d16": 16 * n}
  first = [unit(feats["raw_img"][:, :m])[0, 0] for m in (4, 16)]
  np.testing.assert_allclose(objective, 0.25 * first[0] + 0.75 * first[1], rtol=1e-6)
  np.testing.assert_allclose(metrics["loss"], 10 * objective, rtol=1e-6)
  with pytest.raises(ValueError, match="has state for each width"):
    make("matryoshka", dict(base="counting")).init({})


@pytest.mark.parametrize("width,expected", [(4, {4}), (8, {8}), (24, {8, 16, 24})])
def test_default_widths_are_powers_of_two_up_to_the_whole(width, expected):
  feats, _ = pairs(4, width, dtype=np.float32)
  loss = make("matryoshka", dict(reduction="mean"))
  logs = loss.apply(loss.init({})[0], {}, feats, {}, AT)[1][1]
  assert {int(k[1:]) for k in logs if k[1:].isdigit()} == expected
  mean = np.mean([logs[f"d{m}"] for m in expected])
  np.testing.assert_allclose(logs["loss"], mean, rtol=1e-6)


@pytest.mark.parametrize(
  "terms,error,message",
  [
    (dict(sail=dict(reduction="mean")), ValueError, "sail.reduction.*mean_all"),
    (dict(focal_itc=dict(gamma=-1.0)), ValueError, "focal_itc.gamma=-1.0"),
    (dict(clip_intra_neg=dict(w_txt=-0.5)), ValueError, "clip_intra_neg.w_txt=-0.5"),
    (dict(m3co=dict(perm_scope="host")), ValueError, "m3co.perm_scope.*'shard'"),
    (dict(m3co=dict(alpha=0.0)), ValueError, "m3co.alpha=0.0"),
    (dict(m3mix=dict(alpha_m=0.0)), ValueError, "alpha_m=0.0"),
    (dict(matryoshka=dict(base="clipp")), ValueError, "matryoshka.base.*Did you mean 'clip'"),
    (dict(matryoshka=dict(base_options=dict(t=1.0))), TypeError, "matryoshka.base_options.*t_init"),
    (dict(matryoshka=dict(dims=(16, 8))), ValueError, r"dims=\(16, 8\) must be ascending"),
    (
      dict(matryoshka=dict(dims=(8, 16), weights=(1.0,))),
      ValueError,
      "one weight for each of dims",
    ),
    (dict(matryoshka=dict(reduction="max")), ValueError, "matryoshka.reduction.*'mean'"),
  ],
)
def test_errors_name_the_option(terms, error, message):
  with pytest.raises(error, match=message):
    losses.make_loss(terms)


def test_a_width_beyond_the_embedding_is_named():
  feats, _ = pairs(4, 16, dtype=np.float32)
  with pytest.raises(ValueError, match=r"dims=\(8, 32\).*16 wide"):
    make("matryoshka", dict(dims=(8, 32))).apply({}, {}, feats, {}, AT)
