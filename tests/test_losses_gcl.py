"""The global contrastive losses against the oracles' trajectories, and what must hold of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_oracles import at, both_precisions, cases, floats, ids, make, oracles, unit

from bigalign.losses import schedules

ETA = dict(const="constant", cosine="cosine", exp="exponential")


def sogclr_options(p):
  assert p["include_diag"] != p["init_first_visit"], "neither the paper nor the release"
  options = dict(
    gamma=p["gamma"], eps=p["eps"], variant="released" if p["include_diag"] else "paper"
  )
  if not p["learn_tau"]:
    return options | dict(tau=p["tau_init"])
  return options | dict(
    tau_init=p["tau_init"], tau_min=p["tau_min"], tau_max=p["tau_max"], rho=p["rho"],
    eta=p["eta_init"], eta_min=p["eta_min"], eta_schedule=ETA[p["eta_sched"]],
    eta_over="1 epoch" if p["eta_sched"] == "exp" else "5 epochs", eta_decay=p["eta_exp_gamma"],
    beta=p["beta_u"], grad_clip=p["grad_clip"],
  )


def fastclip_options(p):
  common = dict(
    eps=p["eps"], gamma=p["gamma"], gamma_schedule=p["gamma_schedule"],
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
    feats = {ours: unit(z[k]) if normalize else z[k] for k, ours in (("img", "zimg"), ("txt", "ztxt"))}
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
@pytest.mark.parametrize("tau_gradient", ["released", "consistent"])
@pytest.mark.parametrize(
  "case", cases("fastclip_v0") + cases("fastclip_v1") + cases("fastclip_v3")
)
def test_fastclip(case, precision, tau_gradient):
  learned = case["loss"] != "fastclip_v1"
  options = fastclip_options(case["params"])
  options |= dict(tau_gradient=tau_gradient) if learned else {}

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
@pytest.mark.parametrize("weighting", ["released", "rgcl"])
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
