"""The global contrastive losses: expected trajectories, and invariances."""

from __future__ import annotations

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_oracles import at, both_precisions, cases, floats, ids, make, oracles, unit
from helpers.marks import slow_unless

from bigalign import losses, sharding
from bigalign.losses import schedules
from bigalign.losses.engine import pairwise
from bigalign.losses.per_sample import tables

ETA = dict(const="constant", cosine="cosine", exp="exponential")


def sogclr_options(p):
  assert p["include_diag"] != p["init_first_visit"], "neither the paper nor the release"
  options = dict(
    gamma=p["gamma"], eps=p["eps"], variant="released" if p["include_diag"] else "paper"
  )
  if not p["learn_tau"]:
    return options | dict(tau=p["tau_init"])
  return options | dict(
    tau_init=p["tau_init"],
    tau_min=p["tau_min"],
    tau_max=p["tau_max"],
    rho=p["rho"],
    eta=p["eta_init"],
    eta_min=p["eta_min"],
    eta_schedule=ETA[p["eta_sched"]],
    eta_over="1 epoch" if p["eta_sched"] == "exp" else "5 epochs",
    eta_decay=p["eta_exp_gamma"],
    beta=p["beta_u"],
    grad_clip=p["grad_clip"],
  )


def fastclip_options(p):
  common = dict(
    eps=p["eps"],
    gamma=p["gamma"],
    gamma_schedule=p["gamma_schedule"],
    gamma_over=f"{p['gamma_decay_epochs']} epochs",
  )
  if p.get("version"):
    return common | (dict(rho=p["rho"]) if p["version"] == "v3" else {})
  same = ("rho", "tau_init", "lr_tau", "eps_tau", "grad_clip", "tau_min", "tau_max")
  return common | {k: p[k] for k in same} | dict(b1=p["beta1"], b2=p["beta2"])


@functools.cache
def compiled(name, options, normalize):
  """One step, for all trajectories with these options: (z, params, state, batch, step, tau)."""

  def value(z, params, state, batch, step, tau):
    loss = make(name, dict(options) | tau)
    z = {k: unit(x) if normalize else x for k, x in z.items()}
    feats = {"zimg": z["img"], "ztxt": z["txt"]}
    return loss.apply(params, state, feats, batch, at(step, epochs=step))

  return jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))


def trajectory(case, precision, options, names, learned=False):
  """All steps of a case; names: (dz, dp, state, metrics) -> what the oracle calls them."""
  n, scales = case["data_size"], case["params"].get("log_scales")
  state = make(case["loss"], options).init({"image": n, "text": n})[1]
  step_of = compiled(case["loss"], tuple(options.items()), case["normalize"])
  for step in range(len(case["steps"])):
    inputs = floats(oracles().inputs(case, step=step), precision)
    batch = {"image_id": ids(inputs["img_ids"]), "text_id": ids(inputs["txt_ids"])}
    params = {"t": jnp.asarray(scales[step], precision)} if learned else {}
    tau = {"tau": np.exp(-scales[step])} if scales and not learned else {}
    z = {k: inputs[k] for k in ("img", "txt")}
    (_, (state, metrics)), (dz, dp) = step_of(z, params, state, batch, step, tau)
    got, required = names(dz, dp, state, metrics)
    rtol = 1e-9 if precision == "float64" else 1e-4
    taus = {k: got.pop(k) for k in [*got] if "tau" in k}
    oracles().check(case, got, step=step, rtol=rtol, require=required)
    if taus:
      oracles().check(case, taus, step=step, rtol=max(rtol, 3e-4 * (rtol > 1e-9)), require=taus)


def state_names(case, state):
  """The oracle's tables, from ours."""
  found = {}
  for side in ("img", "txt"):
    table = {k: x[: case["data_size"]] for k, x in state[side].items()}
    found[f"state_log_u_{side}"] = table["log_u"]
    if "b" in table:
      found[f"state_b_{side}"] = found[f"state_bound_{side}"] = table["b"]
      found[f"state_s_{side}"] = jnp.exp(table["log_u"] - table["b"])
    for ours, theirs in (("tau", ["tau"]), ("m", ["m", "adam_m"]), ("v", ["adam_v"])):
      found |= {f"state_{k}_{side}": table[ours] for k in theirs if ours in table}
  return found


def clean(names, case):
  """Only what the case holds."""
  held = {k for step in case["steps"] for k in (*step["expect"], *step["arrays"])}
  return {k: x for k, x in names.items() if k in held}


@both_precisions
@pytest.mark.parametrize("case", cases("sogclr") + cases("isogclr"))
def test_sogclr(case, precision):
  def names(dz, dp, state, metrics):
    got = {k: metrics[k] for k in ("loss", "objective", "eta") if k in metrics}
    got |= {f"d_{k}": x for k, x in dz.items()} | clean(state_names(case, state), case)
    return got, ["loss", "objective", "d_img", "d_txt", *(k for k in got if "log_u" in k)]

  trajectory(case, precision, sogclr_options(case["params"]), names)


@both_precisions
@pytest.mark.parametrize("case", cases("sogclr_unimodal"))
def test_sogclr_unimodal(case, precision):
  def names(dz, dp, state, metrics):
    u = jnp.exp(state["log_u"][: case["data_size"]])
    got = {"loss": metrics["loss"], "d_img": dz["img"], "d_txt": dz["txt"], "state_u": u}
    return got, [*got]

  trajectory(case, precision, case["params"], names)


@both_precisions
@pytest.mark.parametrize("tau_gradient", slow_unless(["released", "consistent"], "released".__eq__))
@pytest.mark.parametrize("case", cases("fastclip_v0") + cases("fastclip_v3"))
def test_fastclip_learned(case, precision, tau_gradient):
  fastclip(case, precision, tau_gradient)


@both_precisions
@pytest.mark.parametrize("case", cases("fastclip_v1"))
def test_fastclip_constant(case, precision):
  fastclip(case, precision)


def fastclip(case, precision, tau_gradient=""):
  learned = bool(tau_gradient)
  options = fastclip_options(case["params"]) | (dict(tau_gradient=tau_gradient) if learned else {})

  def names(dz, dp, state, metrics):
    got = {"loss_reported": metrics["loss"]} | {k: metrics[k] for k in ("objective", "gamma")}
    got |= {f"d_{k}__released": x for k, x in dz.items()}
    if learned:
      got[f"d_log_scale__{tau_gradient}"] = dp["t"]
    for side in ("img", "txt"):
      got[f"state_u_{side}"] = jnp.exp(state[side]["log_u"][: case["data_size"]])
    return got, [*got]

  trajectory(case, precision, options, names, learned)


@both_precisions
@pytest.mark.parametrize("weighting", slow_unless(["released", "rgcl"], "released".__eq__))
@pytest.mark.parametrize("case", cases("fastclip_v2"))
def test_fastclip_v2(case, precision, weighting):
  def names(dz, dp, state, metrics):
    got = {"loss_reported": metrics["loss"], "gamma": metrics["gamma"]}
    got |= {f"d_{k}__{weighting}": x for k, x in dz.items()}
    tables = state_names(case, state)
    tables |= {f"state_u_{side}": tables[f"state_s_{side}"] for side in ("img", "txt")}
    got |= clean(tables, case)
    return got, [k for k in got if "tau" not in k]

  options = fastclip_options(case["params"]) | dict(weighting=weighting)
  trajectory(case, precision, options, names)


@both_precisions
@pytest.mark.parametrize("case", cases("gamma_schedule"))
def test_gamma_schedule(case, precision):
  for name, expected in case["expect"].items():
    end, epochs = (part.split("=")[1] for part in name.split(","))
    over = schedules.duration(f"{epochs} epochs", "here")
    got = [schedules.gamma("cosine", float(end), over, at(0, e)) for e in range(len(expected))]
    np.testing.assert_allclose(got, expected, rtol=1e-9 if precision == "float64" else 1e-6)


# --- invariances ----------------------------------------------------------------------------------

B, E, N = 13, 8, 40


def random_batch(seed, repeated=False):
  """(features, batch) of B pairs with unit rows; ids are repeated inside the batch or not."""
  rng = np.random.default_rng(seed)
  z = rng.normal(size=(2, B, E)) + rng.normal(size=(1, B, E))
  z = np.asarray(z / np.linalg.norm(z, axis=-1, keepdims=True), np.float32)
  draws = [rng.choice(n, B, replace=repeated) for n in (N, 2 * N)]
  fields = {"image_id": ids(draws[0]), "text_id": ids(draws[1])}
  return {"zimg": jnp.asarray(z[0]), "ztxt": jnp.asarray(z[1])}, fields


def step_once(loss, params, state, feats, batch, context):
  """Gradients of features and scalars, the new state, metrics."""

  def value(feats, params):
    return loss.apply(params, state, feats, batch, context)

  (_, (state, metrics)), (dz, dp) = jax.value_and_grad(value, (0, 1), has_aux=True)(feats, params)
  return dz, dp, state, metrics


def fresh(name, **options):
  """(one compiled step, scalars, first state) of a loss."""
  loss = make(name, options)
  return jax.jit(functools.partial(step_once, loss)), *loss.init({"image": N, "text": 2 * N})


@pytest.mark.slow
def test_without_a_past_sogclr_is_the_gradient_of_log_g():
  """gamma = 1: tau times the gradient of the mean log g of both sides."""
  feats, batch = random_batch(0)
  tau = 0.2
  step, params, state = fresh("sogclr", tau=tau, gamma=1.0)
  dz, *_ = step(params, state, feats, batch, at())

  def objective(feats):
    s = feats["zimg"] @ feats["ztxt"].T
    a = jnp.where(jnp.eye(B, dtype=bool), -jnp.inf, s)
    d = jnp.diag(s)[:, None]
    return tau * sum(jax.nn.logsumexp((x - d) / tau, 1).mean() for x in (a, a.T))

  expected = jax.grad(objective)(feats)
  for k in feats:
    np.testing.assert_allclose(dz[k], expected[k], rtol=1e-4, atol=1e-6)


def test_fastclip_v1_is_sogclr_by_2_tau():
  tau = 0.1
  one, _, state_one = fresh("fastclip_v1", tau=tau, eps=0.0, gamma=0.6, gamma_schedule="constant")
  other, _, state_other = fresh("sogclr", tau=tau, gamma=0.6)
  for step in range(3):
    feats, batch = random_batch(step)
    got, _, state_one, _ = one({}, state_one, feats, batch, at(step, epochs=step))
    expected, _, state_other, _ = other({}, state_other, feats, batch, at(step))
    for k in feats:
      np.testing.assert_allclose(2 * tau * got[k], expected[k], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  "name", ["sogclr", "isogclr", "sogclr_unimodal", "fastclip_v2", "fastclip_v3"]
)
def test_the_order_of_the_batch_does_not_matter(name):
  feats, batch = random_batch(1)
  step, params, state = fresh(name)
  order = np.random.default_rng(0).permutation(B)
  dz, dp, new, metrics = step(params, state, feats, batch, at())
  feats, batch = ({k: x[order] for k, x in d.items()} for d in (feats, batch))
  moved = step(params, state, feats, batch, at())
  same = dict(rtol=1e-4, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a[order], b, **same), dz, moved[0])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **same), (dp, new, metrics), moved[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["isogclr", "sogclr_unimodal", "fastclip_v2", "fastclip_v3"])
def test_eight_devices_keep_the_state_of_one(name):
  """Two steps in a ring, with repeated ids and a batch that does not divide over the devices."""
  mesh = sharding.make_mesh(data=4, fsdp=2)
  options = dict(tau_init=0.07) if name == "isogclr" else {}

  def run(mesh):
    step, params, state = fresh(name, **options)
    if mesh:
      state = jax.device_put(state, jax.tree.map(lambda x: tables.state_sharding(x, mesh), state))
    engine = pairwise.Engine("ring" if mesh else "dense")
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
      for k in range(2):
        dz, dp, state, metrics = step(
          params, state, *random_batch(k, repeated=True), at(k, epochs=1.5 * k, engine=engine)
        )
    return jax.tree.map(np.asarray, (dz, dp, state, metrics))

  def close(a, b):
    np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b))
    a, b = a[np.isfinite(b)], b[np.isfinite(b)]
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(initial=1e-3))

  jax.tree.map(close, run(mesh), run(None))


@pytest.mark.parametrize("name", ["sogclr", "isogclr"])
def test_one_image_twice_in_a_batch_does_not_take_over_the_gradient(name):
  """The text of the first occurrence is a bad match, that of the last one is perfect.

  At a temperature of 0.01, the u of the last one is smaller by exp(100) and more.
  """
  rng = np.random.default_rng(0)
  zimg, ztxt = (np.array(unit(rng.normal(size=(B, E))), np.float32) for _ in range(2))
  zimg[-1] = zimg[0]
  ztxt[-1] = zimg[0]
  feats = {"zimg": jnp.asarray(zimg), "ztxt": jnp.asarray(ztxt)}
  different = {"image_id": ids(np.arange(B)), "text_id": ids(np.arange(B))}
  twice = different | {"image_id": ids(np.r_[: B - 1, 0])}

  def gradients(variant, batch):
    step, params, state = fresh(name, variant=variant)
    dz, _, state, _ = step(params, state, feats, batch, at())
    return dz, state

  expected, plain = gradients("paper", different)
  found, state = gradients("paper", twice)
  for k in feats:  # every image is new: u is the row's own g in both
    np.testing.assert_array_equal(found[k], expected[k])
  # The table has the value of the last occurrence.
  assert state["img"]["log_u"][0] == plain["img"]["log_u"][B - 1]
  # As released: the u of the last one weights both.
  released = gradients("released", twice)[0]
  assert np.abs(released["zimg"]).max() > 1e5 * np.abs(expected["zimg"]).max()


@pytest.mark.parametrize(
  "value,place,share",
  [
    (500, dict(step=250), 0.5),
    ("500 steps", dict(step=1000), 2),
    ("1e9 samples", dict(samples_seen=5e8), 0.5),
    ("18 epochs", dict(epochs=9.9), 0.5),
    ("50%", dict(progress=0.25), 0.5),
  ],
)
def test_durations_pass(value, place, share):
  place = {k: jnp.asarray(v, jnp.int32 if k == "step" else jnp.float32) for k, v in place.items()}
  got = schedules.elapsed(schedules.duration(value, "here"), at()._replace(**place))
  np.testing.assert_allclose(got, share, rtol=1e-6)


@pytest.mark.parametrize(
  "name,options,message",
  [
    ("sogclr", dict(variant="paperr"), r"config.loss.sogclr.variant: unknown 'paperr'.*released"),
    ("isogclr", dict(eta_schedule="linear"), r"config.loss.isogclr.eta_schedule.*cosine"),
    ("isogclr", dict(eta_schedule="cosine", eta_over="soon"), r"isogclr.eta_over: 'soon'"),
    ("fastclip_v0", dict(tau_gradient="both"), r"config.loss.fastclip_v0.tau_gradient.*consistent"),
    (
      "fastclip_v1",
      dict(gamma_schedule="step"),
      r"config.loss.fastclip_v1.gamma_schedule.*constant",
    ),
    ("fastclip_v2", dict(weighting="none"), r"config.loss.fastclip_v2.weighting.*rgcl"),
    ("fastclip_v3", dict(gamma_over="0 epochs"), r"config.loss.fastclip_v3.gamma_over: '0 epochs'"),
    ("sogclr", dict(gamma=1.5), r"config.loss.sogclr.gamma=1.5 must be above 0 and at most 1"),
    ("sogclr_unimodal", dict(gamma=0.0), r"config.loss.sogclr_unimodal.gamma=0.0 must be above 0"),
    ("isogclr", dict(tau_min=0.0), r"config.loss.isogclr.tau_min=0.0 must be above 0"),
    ("fastclip_v2", dict(gamma=-0.1), r"config.loss.fastclip_v2.gamma=-0.1 must be above 0"),
    ("isogclr", dict(eta_over=0), r"config.loss.isogclr.eta_over: 0 must be a duration above 0"),
    ("isogclr", dict(tau_init=2.0), r"isogclr.tau_init=2.0 .*tau_min=0.005 and tau_max=1.0"),
    ("isogclr", dict(beta=1.5), r"config.loss.isogclr.beta=1.5 must be above 0 and at most 1"),
    ("sogclr", dict(eps=-1e-8), r"config.loss.sogclr.eps=-1e-08 must be at least 0"),
    ("fastclip_v0", dict(tau_init=0.005), r"fastclip_v0.tau_init=0.005 .*between 0.01 and 1"),
    ("fastclip_v3", dict(tau_init=0.005), r"fastclip_v3.tau_init=0.005 .*between 0.01 and 1"),
    ("fastclip_v3", dict(slow_below=-1.0), r"fastclip_v3.slow_below=-1.0 must be at least 0"),
    ("fastclip_v2", dict(tau_init=0.005), r"fastclip_v2.tau_init=0.005 .*tau_min=0.01"),
    ("fastclip_v2", dict(b2=1.0), r"config.loss.fastclip_v2.b2=1.0 .* below 1"),
  ],
)
def test_errors_name_the_option(name, options, message):
  with pytest.raises(ValueError, match=message):
    losses.make_loss({name: options})


@pytest.mark.parametrize("tau,share", [(0.07, 1.0), (0.02, 1 / 3)])
def test_a_small_temperature_of_fastclip_v3_moves_a_third_as_far(tau, share):
  loss = make("fastclip_v3", {})
  before = {"t": jnp.asarray(-math.log(tau))}
  after = loss.constrain({"t": before["t"] + 0.03}, before)
  np.testing.assert_allclose(after["t"] - before["t"], 0.03 * share, rtol=1e-4)
  np.testing.assert_allclose(loss.constrain({"t": before["t"] + 99}, before)["t"], math.log(100))


def test_a_ramp_goes_from_start_to_end_in_its_duration():
  linear = schedules.ramp(dict(start=8.0, end=6.0, over="10 steps", shape="linear"), "x")
  cosine = schedules.ramp(dict(start=8.0, end=6.0, over="10 steps"), "x")
  assert [float(linear(at(step=k))) for k in (0, 5, 10, 99)] == [8.0, 7.0, 6.0, 6.0]
  np.testing.assert_allclose([float(cosine(at(step=k))) for k in (0, 5, 10)], [8, 7, 6], rtol=1e-6)
  assert schedules.ramp(6.5, "x")(at()) == 6.5
  with pytest.raises(ValueError, match=r"rho\.shape: unknown 'quadratic'"):
    schedules.ramp(dict(start=1.0, end=2.0, over="5%", shape="quadratic"), "rho")
  with pytest.raises(TypeError, match="'end' is missing"):
    schedules.ramp(dict(start=1.0, over="5%"), "rho")
