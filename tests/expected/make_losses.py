"""Makes losses/oracles.json and losses/oracles.npz: inputs of the loss tests and what to expect.

After a change of a formula, run: python tests/expected/make_losses.py

The JSON lists the cases. A case names its loss (`loss`), its inputs (`inputs`: name -> key of the
npz), its learned scalars (`scalars`: the logarithm of the logit scale, the bias), its options
(`params`), the scalars to expect (`expect`) and the arrays to expect (`arrays`: name -> key of the
npz; kind "full" is the array itself). `d_x` is the derivative of the loss by x. `normalize` says
that rows become unit rows inside, so that derivatives are those by the raw rows. A case with a
state has `steps`: each step has its own `expect` and `arrays`, inputs under traj/ and albef/t_ have
the step as first axis, and `state_x` is a whole table of `data_size` rows after the step. Step k is
epoch k.
"""

from __future__ import annotations

import json
import math
import pathlib

import numpy as np
from loss_formulas import (
  STATEFUL,
  STATELESS,
  gamma_at,
  metrics,
  normed,
  stateless,
)

FOLDER = pathlib.Path(__file__).parent / "losses"
B, D, T, SAMPLES, QUEUE = 8, 8, 4, 15, 18  # rows, widths, steps, ids, keys in a queue
STEP_ROWS = 6


def pairs(rng, *shape, noise=0.8):
  """Two arrays of matching raw rows of different lengths."""
  img = rng.normal(size=shape)
  txt = img + noise * rng.normal(size=shape)
  lengths = rng.uniform(0.5, 4, (2, *shape[:-1], 1))
  return img * lengths[0], txt * lengths[1]


def teachers(rng, n, widths):
  """A concatenation of unit rows per teacher, images and texts."""
  both = [pairs(rng, n, width) for width in widths]
  return tuple(np.concatenate([normed(x) for x in side], 1) for side in zip(*both))


def make_inputs():
  rng = np.random.default_rng(2024)
  x = {}
  for name, n in (("in", B), ("odd", 5), ("metrics", 24)):
    img, txt = pairs(rng, n, D)
    x |= {f"{name}/img_raw": img, f"{name}/txt_raw": txt}
    x |= {f"{name}/img_unit": normed(img), f"{name}/txt_unit": normed(txt)}
  second = x["in/img_raw"] + rng.normal(size=(B, D))
  x |= {"in/txt_second_raw": second, "in/txt_second_unit": normed(second)}
  x["in/teacher_img"], x["in/teacher_txt"] = teachers(rng, B, (3, 5))
  x["in/teacher_txt_syn"] = teachers(rng, B, (3, 5))[1]
  x["in/semantic"] = rng.normal(size=(B, 6))
  x["in/noise_prob"] = rng.uniform(size=B)
  x["in/labels"] = np.array([2, 0, -1, 0, 2, -1, 1, 0])
  x["in/img_owner"] = np.arange(B)
  x["in/txt_owner"] = rng.permutation(np.repeat(np.arange(B), 2))
  x["in/txt_of_owner"] = normed(x["in/img_raw"][x["in/txt_owner"]] + rng.normal(size=(2 * B, D)))
  for side in ("img", "txt"):
    x[f"in/mix_lambda_{side}"] = np.where(rng.random(B) < 0.5, rng.beta(0.3, 0.3, B), 1.0)
    fixed, others = rng.integers(B), rng.permutation(B)
    others[others == fixed], others[fixed] = others[fixed], fixed
    x[f"in/mix_perm_{side}"] = others
    x[f"in/mix_derangement_{side}"] = np.roll(np.arange(B), 1 if side == "img" else 3)
    rng.integers(1, B, B)  # keeps the draws below
  x["sparc/patches"] = rng.normal(size=(4, 5, D))
  x["sparc/tokens"] = rng.normal(size=(4, 6, D))
  x["sparc/mask"] = (np.arange(6) < np.array([[6], [1], [4], [3]])).astype(np.float64)
  img, txt = pairs(rng, 4, D)
  x |= {"sparc/img": normed(img), "sparc/txt": normed(txt)}
  x["coca/logits"] = rng.normal(size=(3, 5, 9))
  x["coca/labels"] = rng.integers(1, 9, (3, 5)) * (np.arange(5) < np.array([[5], [2], [3]]))
  regions, phrases = pairs(rng, 3, 4, D, noise=1.5)
  x |= {"cloc/regions": normed(regions), "cloc/phrases": normed(phrases)}
  x["cloc/mask"] = (np.arange(4) < np.array([[3], [4], [2]])).astype(np.float64)
  x["cloc/phrase_id"] = np.array([[0, 1, 2, 0], [1, 3, 4, 4], [5, 0, 0, 0]])
  img, txt = pairs(rng, T, STEP_ROWS, D)
  x |= {"traj/img_raw": img, "traj/txt_raw": txt}
  x |= {"traj/img_unit": normed(img), "traj/txt_unit": normed(txt)}
  for side in ("img", "txt"):
    ids = np.stack([rng.permutation(SAMPLES)[:STEP_ROWS] for _ in range(T)])
    repeated = ids.copy()
    repeated[:, 4], repeated[1:, 5] = ids[:, 1], ids[1:, 0]
    x |= {f"traj/{side}_ids": ids, f"traj/{side}_ids_dup": repeated}
  img, txt = pairs(rng, T, STEP_ROWS, D)
  x |= {"albef/t_img": normed(img), "albef/t_txt": normed(txt)}
  img, txt = pairs(rng, QUEUE, D)
  x |= {"albef/queue_img": normed(img), "albef/queue_txt": normed(txt)}
  x["albef/queue_ids"] = np.full(QUEUE, -100)
  return x


def plain_cases():
  """(id, loss, inputs, scalars, params) of the losses without state, raw rows of 8 pairs."""
  scale, bias = dict(log_scale=math.log(12)), dict(log_scale=math.log(9), bias=-7.0)
  both = dict(img="in/img_raw", txt="in/txt_raw")
  teacher = dict(t_img="in/teacher_img", t_txt="in/teacher_txt")
  dims = dict(teacher_dims=[3, 5])
  mixtures = dict(lam_v=0.3, lam_l=0.6, lam_vl=0.2, lam_m=0.7)
  mixed = {
    f"{name}_{side}": f"in/mix_{key}_{side}"
    for side in ("img", "txt")
    for name, key in (("lam", "lambda"), ("perm", "perm"))
  }
  deranged = mixed | {f"perm_{side}": f"in/mix_derangement_{side}" for side in ("img", "txt")}
  gap = dict(t=2.0, w_clip=1.0, w_uniform=0.8, w_align=1.2, w_xuniform=0.5)
  distill = dict(dims, teacher_scales=[15.0, 10.0], teacher_biases=[-3.0, -4.0]) | {"lambda": 0.6}
  sparc = {k: f"sparc/{k}" for k in ("patches", "tokens", "mask", "img", "txt")}
  cloc = {k: f"cloc/{k}" for k in ("regions", "phrases", "mask", "phrase_id")}
  weights = dict(w_v=0.1, w_l=0.2, w_vl=0.15, w_m=0.05)
  only_m2 = dict(w_v=0.0, w_l=0.0, w_vl=0.0, w_m=0.3)
  matryoshka = dict(dims=[2, 4, 8], weights=[1.0, 0.5, 2.0], renormalize=True)
  owners = dict(
    img="in/img_unit",
    txt="in/txt_of_owner",
    img_owner="in/img_owner",
    txt_owner="in/txt_owner",
  )
  yield "clip/raw_rows", "clip", both, scale, {}
  yield "clip/smoothing_and_bias", "clip", both, scale | dict(bias=0.4), dict(label_smoothing=0.2)
  yield "siglip/raw_rows", "siglip", both, bias, {}
  for reduction in ("row_sum", "mean_all"):
    yield f"siglip/owners/{reduction}", "siglip", owners, bias, dict(reduction=reduction)
    long = both | dict(txt_long="in/txt_second_raw")
    yield f"sail/{reduction}", "sail", long, bias, dict(reduction=reduction)
  yield "clip_gap/raw_rows", "clip_gap", both, scale, gap
  yield (
    "clip_distill",
    "clip_distill",
    both | teacher,
    scale,
    dict(teacher_scale=20.0, w_hard=0.7, w_soft=1.3),
  )
  dr = dict(dims, teacher_scales=[30.0, 20.0]) | {"lambda": 0.6}
  yield "mobileclip_dr", "mobileclip_dr", both | teacher, scale, dr
  synthetic = dict(txt_syn="in/txt_second_raw", t_txt_syn="in/teacher_txt_syn")
  yield "mobileclip_dr/synthetic", "mobileclip_dr", both | teacher | synthetic, scale, dr
  for form in ("signed", "bce"):
    yield (
      f"siglip_distill/{form}",
      "siglip_distill",
      both | teacher,
      bias,
      distill | dict(form=form),
    )
  yield "m3mix/m2", "m3mix", both, scale, mixtures | only_m2 | dict(tau2=0.1, m2_average=False)
  average = mixtures | only_m2 | dict(tau2=None, m2_average=True)
  yield "m3mix/m2_average", "m3mix", both, scale, average
  yield "m3mix/all", "m3mix", both, scale, mixtures | weights | dict(tau2=0.1, m2_average=False)
  yield "m3co/fixed_point", "m3co", both | mixed, {}, dict(tau=0.2)
  yield "m3co/derangement", "m3co", both | deranged, {}, dict(tau=0.2)
  yield "softclip_m3co", "softclip_m3co", both, {}, dict(tau=0.25)
  yield "matryoshka/clip", "matryoshka", both, scale, matryoshka | dict(base="clip")
  yield "matryoshka/siglip", "matryoshka", both, bias, matryoshka | dict(base="siglip")
  yield "nitc", "nitc", both | dict(noise_prob="in/noise_prob"), scale, {"lambda": 0.4}
  for detached in (False, True):
    options = dict(gamma=1.5, detach_weight=detached)
    yield f"focal_itc/{'detached' if detached else 'full'}", "focal_itc", both, scale, options
  yield "unicl", "unicl", both | dict(labels="in/labels"), scale, {}
  for text, image in ((1.0, 1.0), (1.0, 0.0)):
    options = dict(alpha=1.0, beta=0.4, separate_text=text, separate_image=image)
    semantic = both | dict(sem="in/semantic")
    yield f"alignclip/text{text:.0f}_image{image:.0f}", "alignclip", semantic, scale, options
  yield "clip_intra_neg/both", "clip_intra_neg", both, scale, dict(w_img=0.8, w_txt=1.0)
  yield "clip_intra_neg/text", "clip_intra_neg", both, scale, dict(w_img=0.0, w_txt=0.5)
  yield "cyclip", "cyclip", both, scale, dict(l_in=0.3, l_cross=0.2)
  for threshold in (None, 0.4):
    options = dict(threshold=threshold, w_global=0.5, w_fine=1.0)
    yield f"sparc/threshold_{threshold}", "sparc", sparc, scale, options
  coca = dict(logits="coca/logits", labels="coca/labels")
  yield "coca_caption", "coca_caption", coca, {}, dict(pad_id=0, weight=1.5)
  yield "cloc_region", "cloc_region", cloc, scale, {}
  # The rows as they are: unit rows; raw rows that stay raw; an odd batch with a scale of 100.
  unit, hot = dict(img="in/img_unit", txt="in/txt_unit"), math.log(100)
  yield "clip/unit_rows", "clip", unit, scale, {}
  yield "siglip/unit_rows", "siglip", unit, bias, {}
  yield "clip_gap/unit_rows", "clip_gap", unit, scale, gap
  odd = dict(img="odd/img_raw", txt="odd/txt_raw")
  yield "clip/odd_hot", "clip", odd, dict(log_scale=hot), {}
  yield "siglip/odd_hot", "siglip", odd, dict(log_scale=hot, bias=-10.0), {}


def step_cases():
  """(id, loss, normalize, extra inputs, params) of the losses with a state."""
  once = dict(gamma=0.7, eps=1e-10, learn_tau=False, rho=0.0, tau_init=0.1)
  learned = dict(
    gamma=0.7,
    eps=1e-10,
    learn_tau=True,
    rho=5.0,
    tau_init=0.08,
    eta_init=0.02,
    eta_min=1e-4,
    eta_sched="const",
    eta_exp_gamma=0.8,
    beta_u=0.9,
    grad_clip=4.0,
    tau_min=0.01,
    tau_max=1.0,
  )
  released = dict(include_diag=True, init_first_visit=False)
  paper = dict(include_diag=False, init_first_visit=True, eps=0.0)
  yield "sogclr/released", "sogclr", False, False, once | released
  yield "sogclr/released_raw_rows", "sogclr", True, False, once | released
  yield "sogclr/released_repeated_ids", "sogclr", False, True, once | released
  yield "sogclr/paper", "sogclr", False, False, once | paper
  yield "isogclr/released", "isogclr", False, False, learned | released | dict(tau_init=0.02)
  yield (
    "isogclr/released_cosine",
    "isogclr",
    False,
    False,
    learned | released | dict(eta_sched="cosine"),
  )
  yield (
    "isogclr/released_exp",
    "isogclr",
    True,
    False,
    learned | released | dict(eta_sched="exp", tau_init=0.3, rho=1.0),
  )
  yield "isogclr/released_repeated_ids", "isogclr", False, True, learned | released
  yield "isogclr/paper", "isogclr", False, False, learned | paper
  yield "sogclr_unimodal", "sogclr_unimodal", False, False, dict(tau=0.2, gamma=0.6)
  common = dict(gamma=0.3, gamma_schedule="cosine", gamma_decay_epochs=3, eps=1e-14, rho=6.0)
  large = dict(eps=1e-5, gamma_schedule="constant")
  global_tau = dict(log_scales=[math.log(s) for s in (8, 12, 20, 35)])
  for version in ("v0", "v1", "v3"):
    name, options = f"fastclip_{version}", common | global_tau | dict(version=version)
    yield f"{name}/plain", name, False, False, options
    yield f"{name}/repeated_ids", name, False, True, options
    yield f"{name}/raw_rows_large_eps", name, True, False, options | large
  own_tau = dict(
    tau_init=0.05,
    lr_tau=0.01,
    beta1=0.8,
    beta2=0.95,
    eps_tau=1e-6,
    grad_clip=4.0,
    tau_min=0.02,
    tau_max=1.0,
  )
  for kind, normalize, repeated in (
    ("plain", False, False),
    ("repeated_ids", False, True),
    ("raw_rows", True, False),
  ):
    yield f"fastclip_v2/{kind}", "fastclip_v2", normalize, repeated, common | own_tau
  albef = dict(alphas=[0.0, 0.15, 0.3, 0.5], temps=[0.1, 0.08, 0.3, 0.05])
  yield "albef_itc/plain", "albef_itc", False, False, albef
  yield "albef_itc/ids", "albef_itc", False, True, albef


def expectation(values, key, arrays):
  """The values of one case or step as `expect` and `arrays`; the arrays go into the npz."""
  expect = {k: x for k, x in values.items() if np.ndim(x) == 0}
  named = {}
  for k, x in values.items():
    if np.ndim(x):
      arrays[f"{key}/{k}"] = x
      named[k] = dict(key=f"{key}/{k}", kind="full")
  return dict(expect=expect, arrays=named)


def at_step(key, x, k):
  return x[k] if key.startswith(("traj/", "albef/t_")) else x


def make():
  """(cases, {key: array})."""
  arrays, cases = make_inputs(), []
  for key, loss, names, scalars, params in plain_cases():
    assert loss in STATELESS, loss
    raw = any(name.endswith("_raw") for name in names.values())
    case = dict(id=key, loss=loss, normalize=raw and loss not in ("m3co", "softclip_m3co"))
    case |= dict(inputs=names, scalars=scalars, params=params, tags=[])
    values = stateless(case, {k: arrays[name] for k, name in names.items()})
    cases.append(case | expectation(values, key, arrays))
  for key, loss, normalize, repeated, params in step_cases():
    rows = "raw" if normalize else "unit"
    names = {side: f"traj/{side}_{rows}" for side in ("img", "txt")}
    if loss == "albef_itc":
      names |= {k: f"albef/{k}" for k in ("t_img", "t_txt", "queue_img", "queue_txt")}
      names |= dict(ids="traj/img_ids_dup", queue_ids="albef/queue_ids") if repeated else {}
    else:
      dup = "_dup" if repeated else ""
      names |= {f"{side}_ids": f"traj/{side}_ids{dup}" for side in ("img", "txt")}
    case = dict(id=key, loss=loss, normalize=normalize, stateful=True, data_size=SAMPLES)
    case |= dict(inputs=names, params=params, tags=[], steps=[])
    start, one_step = STATEFUL[loss]
    state = start(case)
    for k in range(T):
      inputs = {name: at_step(path, arrays[path], k) for name, path in names.items()}
      values, state = one_step(case, inputs, state, k)
      case["steps"].append(dict(step=k) | expectation(values, f"{key}/s{k}", arrays))
    cases.append(case)
  schedule = {
    f"gamma={end},E={epochs}": [gamma_at(epoch, end, epochs) for epoch in range(epochs + 2)]
    for end in (0.3, 0.75)
    for epochs in (3, 7)
  }
  cases.append(dict(id="gamma_schedule", loss="gamma_schedule", expect=schedule, tags=[]))
  rows = np.random.default_rng(5).permutation(24).tolist()
  case = dict(id="metrics", loss="metrics", normalize=True, tags=[])
  case["inputs"] = {side: f"metrics/{side}_raw" for side in ("img", "txt")}
  split = dict(train=rows[:19], test=rows[19:])
  case["params"] = dict(uniformity_t=2.0, logreg_C=1.0, split=split)
  cases.append(case | dict(expect=metrics(case, {k: arrays[v] for k, v in case["inputs"].items()})))
  return cases, arrays


def main():
  cases, arrays = make()
  FOLDER.mkdir(exist_ok=True)
  lines = ",\n".join(json.dumps(case) for case in cases)
  (FOLDER / "oracles.json").write_text(f'{{"meta": {{"set": "small"}}, "cases": [\n{lines}\n]}}\n')
  np.savez_compressed(FOLDER / "oracles.npz", **arrays)


if __name__ == "__main__":
  main()
