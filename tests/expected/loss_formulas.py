"""The losses in NumPy and float64, written from the formulas of their papers.

They define the expected values of the loss tests, so they share no code with bigalign.

Derivatives come from the complex step: for a real-analytic function f and a tiny h,
f(x + ih) = f(x) + ih f'(x), exact to rounding because nothing is subtracted (Squire and Trapp 1998,
"Using complex variables to estimate derivatives of real functions"). Two rules follow. No formula
may conjugate (so no np.linalg.norm and no np.abs of a feature), and the real part of a number is
that number without its derivative: `stop` is the stop-gradient of the papers.
"""

from __future__ import annotations

import numpy as np

STEP = 1e-30
EPOCHS = 5  # of the learning rate schedules of the temperatures in iSogCLR


def stop(x):
  """The value without its derivative."""
  return np.real(x)


def derivatives(value, inputs):
  """{name: derivative of value(inputs)["loss"] by inputs[name]}, same shapes as the inputs."""
  results = {}
  for name, x in inputs.items():
    x = np.asarray(x, np.float64)
    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
      moved = x.astype(np.complex128)
      moved[index] += 1j * STEP
      gradient[index] = np.imag(value({**inputs, name: moved})["loss"]) / STEP
    results[name] = gradient
  return results


# --- functions of numbers and rows --------------------------------------------------------------


def normed(x):
  """Rows divided by their Euclidean norms."""
  return x / np.sqrt(np.sum(x * x, -1, keepdims=True))


def log1p(x):
  return np.log1p(stop(x)) + 1j * np.imag(x) / (1 + stop(x))


def arccos(x):
  return np.arccos(stop(x)) - 1j * np.imag(x) / np.sqrt(1 - stop(x) ** 2)


def softplus(x):
  large = stop(x) > 0
  return np.where(large, x, 0) + log1p(np.exp(np.where(large, -x, x)))


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def log_sum_exp(x, axis=-1):
  top = stop(x).max(axis, keepdims=True)
  top = np.where(np.isfinite(top), top, 0)
  return np.log(np.sum(np.exp(x - top), axis)) + top.squeeze(axis)


def log_softmax(x):
  return x - log_sum_exp(x)[..., None]


def softmax(x):
  return np.exp(log_softmax(x))


def cross_entropy(targets, logits):
  """H(T, Z): mean over the rows of -sum_j T_ij log softmax(Z_i)_j."""
  return -np.mean(np.sum(targets * log_softmax(logits), -1))


def both_ways(targets, logits):
  """H of rows and columns, averaged."""
  return (cross_entropy(targets, logits) + cross_entropy(targets.T, logits.T)) / 2


def off_diagonal(n):
  return ~np.eye(n, dtype=bool)


# --- softmax and sigmoid ------------------------------------------------------------------------


def clip(x, s, p):
  """InfoNCE (van den Oord et al. 2018; Radford et al. 2021), with label smoothing."""
  n, smoothing = len(x["img"]), p.get("label_smoothing", 0.0)
  logits = np.exp(s["log_scale"]) * x["img"] @ x["txt"].T + s.get("bias", 0)
  targets = (1 - smoothing) * np.eye(n) + smoothing / n
  i2t, t2i = cross_entropy(targets, logits), cross_entropy(targets, logits.T)
  return dict(loss=(i2t + t2i) / 2, i2t=i2t, t2i=t2i)


def pairwise_sigmoid(positive, logits):
  """(sum over positives, sum over negatives) of -log sigmoid(+-logits)."""
  return (
    np.sum(np.where(positive, softplus(-logits), 0)),
    np.sum(np.where(positive, 0, softplus(logits))),
  )


def siglip(x, s, p):
  """Sigmoid loss (Zhai et al. 2023); several texts of an image are all its positives."""
  logits = np.exp(s["log_scale"]) * x["img"] @ x["txt"].T + s["bias"]
  images, texts = logits.shape
  positive = np.eye(images, dtype=bool)
  if "txt_owner" in x:
    positive = x["img_owner"][:, None] == x["txt_owner"]
  pos, neg = (part / images for part in pairwise_sigmoid(positive, logits))
  divisor = texts if p.get("reduction") == "mean_all" else 1  # of the loss, not of its parts
  return dict(loss=(pos + neg) / divisor, pos_part=pos, neg_part=neg)


def sail(x, s, p):
  """Short and long captions, each with its own sigmoid matrix (SAIL, Zhang et al. 2025)."""
  short, long = (siglip({**x, "txt": x[k]}, s, {})["loss"] for k in ("txt", "txt_long"))
  divisor = 2 * len(x["txt"]) if p["reduction"] == "mean_all" else 1
  return dict(loss=(short + long) / divisor, short=short, long=long)


def nitc(x, s, p):
  """Noise-adaptive contrast (NEVLP): the smoothing of a pair grows with its noise."""
  n = len(x["img"])
  share = (p["lambda"] * x["noise_prob"])[:, None]
  targets = np.where(np.eye(n, dtype=bool), 1 - share, share / (n - 1))
  logits = np.exp(s["log_scale"]) * x["img"] @ x["txt"].T
  i2t, t2i = cross_entropy(targets, logits), cross_entropy(targets, logits.T)
  return dict(loss=(i2t + t2i) / 2, i2t=i2t, t2i=t2i)


def focal_itc(x, s, p):
  """Focal weights (1 - p)^gamma of the positives (Lin et al. 2017)."""
  logits = np.exp(s["log_scale"]) * x["img"] @ x["txt"].T

  def direction(z):
    log_p = np.diag(log_softmax(z))
    weight = (1 - np.exp(log_p)) ** p["gamma"]
    return np.mean(-(stop(weight) if p["detach_weight"] else weight) * log_p)

  i2t, t2i = direction(logits), direction(logits.T)
  return dict(loss=(i2t + t2i) / 2, i2t=i2t, t2i=t2i)


def unicl(x, s, p):
  """Pairs with the same label are positives (UniCL, Yang et al. 2022); -1 is a label of its own."""
  labels = x["labels"]
  same = (labels[:, None] == labels) & (labels >= 0) | np.eye(len(labels), dtype=bool)
  targets = same / same.sum(1, keepdims=True)
  logits = np.exp(s["log_scale"]) * x["img"] @ x["txt"].T
  i2t, t2i = cross_entropy(targets, logits), cross_entropy(targets, logits.T)
  return dict(loss=(i2t + t2i) / 2, i2t=i2t, t2i=t2i)


def clip_intra_neg(x, s, p):
  """CLIP with negatives from the anchor's own modality, weighted."""
  n = len(x["img"])

  def direction(a, c, weight):
    logits = np.exp(s["log_scale"]) * a @ c.T
    own = np.where(off_diagonal(n), np.exp(s["log_scale"]) * a @ a.T, -np.inf)
    if weight:
      own = own + np.log(weight)
      every = log_sum_exp(np.concatenate([logits, own], 1))
    else:
      every = log_sum_exp(logits)
    return np.mean(every - np.diag(logits))

  i2t = direction(x["img"], x["txt"], p["w_img"])
  t2i = direction(x["txt"], x["img"], p["w_txt"])
  return dict(loss=(i2t + t2i) / 2, i2t=i2t, t2i=t2i)


# --- geometry -----------------------------------------------------------------------------------


def squared_distances(a, b):
  difference = a[:, None] - b[None]
  return np.sum(difference * difference, -1)


def uniformity(a, t=2.0):
  """log mean over pairs i < j of exp(-t |a_i - a_j|^2) (Wang and Isola 2020)."""
  pairs = squared_distances(a, a)[np.triu_indices(len(a), 1)]
  return np.log(np.mean(np.exp(-t * pairs)))


def cross_uniformity(x, y, t=2.0):
  return np.log(np.mean(np.exp(-t * squared_distances(x, y)[off_diagonal(len(x))])))


def clip_gap(x, s, p):
  """CLIP, uniformity, alignment and cross-modal uniformity (Fahim et al. 2024)."""
  img, txt, t = x["img"], x["txt"], p["t"]
  parts = dict(
    clip=clip(x, s, {})["loss"],
    uniform=(uniformity(img, t) + uniformity(txt, t)) / 2,
    xuniform=cross_uniformity(img, txt, t),
    align=np.mean(np.sum((img - txt) * (img - txt), -1)),
  )
  return dict(loss=sum(p[f"w_{name}"] * part for name, part in parts.items()), **parts)


def cyclip(x, s, p):
  """Cyclic consistency of the similarities (Goel et al. 2022)."""
  img, txt = x["img"], x["txt"]
  own, cross = img @ img.T - txt @ txt.T, img @ txt.T - txt @ img.T
  parts = dict(
    clip=clip(x, s, {})["loss"],
    in_modal=np.sum(own * own) / len(img),
    cross_modal=np.sum(cross * cross) / len(img),
  )
  total = parts["clip"] + p["l_in"] * parts["in_modal"] + p["l_cross"] * parts["cross_modal"]
  return dict(loss=total, **parts)


def alignclip(x, s, p):
  """Separation within a modality, by the distances of a sentence encoder (Eslami et al. 2024)."""
  n, scale, semantic = len(x["img"]), np.exp(s["log_scale"]), normed(x["sem"])
  weight = np.where(off_diagonal(n), 1 - semantic @ semantic.T, 0)
  own = np.sum(x["img"] * x["txt"], -1)
  eye = np.eye(n)

  def separate(a):
    return cross_entropy(eye, scale * ((a @ a.T) * weight + np.diag(own)))

  logits = scale * x["img"] @ x["txt"].T
  cross = cross_entropy(eye, logits) + cross_entropy(eye, logits.T)
  apart = {
    name: separate(x[side])
    for name, side, flag in (("tt", "txt", "separate_text"), ("vv", "img", "separate_image"))
    if p[flag]
  }
  return dict(loss=p["alpha"] * cross + p["beta"] * sum(apart.values()), cross=cross, **apart)


# --- teachers -----------------------------------------------------------------------------------


def clip_distill(x, s, p):
  """CLIP plus the cross-entropy with a teacher's probabilities."""
  teacher = p["teacher_scale"] * x["t_img"] @ x["t_txt"].T
  logits = np.exp(s["log_scale"]) * x["img"] @ x["txt"].T
  hard = clip(x, s, {})["loss"]
  soft = cross_entropy(softmax(teacher), logits) + cross_entropy(softmax(teacher.T), logits.T)
  soft = soft / 2
  return dict(loss=p["w_hard"] * hard + p["w_soft"] * soft, hard=hard, soft=soft)


def split(x, widths):
  return np.split(x, np.cumsum(widths)[:-1], axis=1)


def mobileclip_dr(x, s, p):
  """An ensemble of teachers (MobileCLIP, Vasu et al. 2024); a synthetic caption adds its own sum.

  The probabilities of the teachers are averaged, in each direction on its own.
  """

  def part(txt, t_txt):
    logits = np.exp(s["log_scale"]) * x["img"] @ txt.T
    teachers = [
      scale * a @ b.T
      for scale, a, b in zip(
        p["teacher_scales"], split(x["t_img"], p["teacher_dims"]), split(t_txt, p["teacher_dims"])
      )
    ]
    rows, columns = (
      np.mean([softmax(z) for z in zs], 0) for zs in (teachers, [z.T for z in teachers])
    )
    soft = (cross_entropy(rows, logits) + cross_entropy(columns, logits.T)) / 2
    hard = both_ways(np.eye(len(txt)), logits)
    return np.array([(1 - p["lambda"]) * hard, p["lambda"] * soft])

  parts = part(x["txt"], x["t_txt"])
  if "txt_syn" in x:
    parts = parts + part(x["txt_syn"], x["t_txt_syn"])
  return dict(loss=parts.sum(), hard=parts[0], soft=parts[1])


def siglip_distill(x, s, p):
  """Sigmoid loss with the mean of the teachers' probabilities as targets (MobileCLIP2)."""
  n = len(x["img"])
  q = np.mean(
    [
      sigmoid(scale * a @ b.T + bias)
      for scale, bias, a, b in zip(
        p["teacher_scales"],
        p["teacher_biases"],
        split(x["t_img"], p["teacher_dims"]),
        split(x["t_txt"], p["teacher_dims"]),
      )
    ],
    0,
  )
  logits = np.exp(s["log_scale"]) * x["img"] @ x["txt"].T + s["bias"]
  if p["form"] == "signed":
    soft = np.sum(softplus(-(2 * q - 1) * logits)) / n
  else:
    soft = np.sum(q * softplus(-logits) + (1 - q) * softplus(logits)) / n
  hard = siglip(x, s, {})["loss"]
  return dict(loss=(1 - p["lambda"]) * hard + p["lambda"] * soft, hard=hard, soft=soft)


# --- mixtures -----------------------------------------------------------------------------------


def geodesic(a, b, share):
  """The point of the arc from b to a that has gone `share` of the way."""
  angle = arccos(np.sum(a * b, -1, keepdims=True))
  return (np.sin(share * angle) * a + np.sin((1 - share) * angle) * b) / np.sin(angle)


def m3mix(x, s, p):
  """Geodesic mixtures with the reversed batch and between modalities (Oh et al. 2023)."""
  img, txt, n = x["img"], x["txt"], len(x["img"])
  scale, eye, turned = np.exp(s["log_scale"]), np.eye(n), np.eye(n)[::-1]
  v, l, vl, m = (p[f"lam_{name}"] for name in ("v", "l", "vl", "m"))

  def mixed(z, share):
    return geodesic(z, z[::-1], share)

  between = geodesic(img, txt, m)
  own = np.sum(img * txt, -1)[:, None]
  scale2 = 1 / p["tau2"] if p["tau2"] else scale

  def against_mixtures(a):
    return cross_entropy(eye, scale2 * np.where(eye > 0, own, a @ between.T))

  m2 = against_mixtures(img) + against_mixtures(txt)
  parts = dict(
    clip=both_ways(eye, scale * img @ txt.T),
    v=both_ways(v * eye + (1 - v) * turned, scale * mixed(img, v) @ txt.T),
    l=both_ways(l * eye + (1 - l) * turned, scale * img @ mixed(txt, l).T),
    vl=both_ways(eye + turned, scale * mixed(img, vl) @ mixed(txt, vl).T),
    m2=m2 / 2 if p["m2_average"] else m2,
  )
  weights = dict(clip=1.0, v=p["w_v"], l=p["w_l"], vl=p["w_vl"], m2=p["w_m"])
  return dict(loss=sum(weights[name] * part for name, part in parts.items()), **parts)


def m3co(x, s, p):
  """Mixtures of raw rows with soft targets (M3CoL, Kumar et al. 2024)."""

  def direction(a, c, share, partner):
    n, share = len(a), share[:, None]
    mixed = share * a + (1 - share) * a[partner]
    targets = share * np.eye(n) + (1 - share) * np.eye(n)[partner]
    return both_ways(targets, normed(mixed) @ normed(c).T / p["tau"])

  img = direction(x["img"], x["txt"], x["lam_img"], x["perm_img"])
  txt = direction(x["txt"], x["img"], x["lam_txt"], x["perm_txt"])
  return dict(loss=img + txt, img_mix=img, txt_mix=txt)


def softclip_m3co(x, s, p):
  """Targets are the similarities within the other modality; they have a gradient too."""
  img, txt = normed(x["img"]), normed(x["txt"])

  def direction(a, c):
    targets, logits = softmax(c @ c.T / p["tau"]), a @ c.T / p["tau"]
    return (cross_entropy(targets, logits) + cross_entropy(targets, logits.T)) / 2

  txt_to_img, img_to_txt = direction(txt, img), direction(img, txt)
  return dict(loss=txt_to_img + img_to_txt, txt_to_img=txt_to_img, img_to_txt=img_to_txt)


def matryoshka(x, s, p):
  """A weighted sum of a loss over prefixes of the embedding (Kusupati et al. 2022)."""
  base = dict(clip=clip, siglip=siglip)[p["base"]]
  parts = {
    f"d{width}": base({k: normed(x[k][:, :width]) for k in ("img", "txt")}, s, {})["loss"]
    for width in p["dims"]
  }
  return dict(loss=sum(c * part for c, part in zip(p["weights"], parts.values())), **parts)


# --- tokens, regions, captions ------------------------------------------------------------------


def sparc(x, s, p):
  """Sparse alignment of words and patches within each pair (Bica et al. 2024)."""
  patches, tokens, mask = x["patches"], x["tokens"], x["mask"] > 0
  scale, count = np.exp(s["log_scale"]), patches.shape[1]
  similarity = np.einsum("btd,bpd->btp", tokens, patches)

  def picked(order):
    index = order(stop(similarity), -1)[..., None]
    return np.take_along_axis(similarity, index, -1)

  low, high = picked(np.argmin), picked(np.argmax)
  similarity = (similarity - low) / (high - low)
  threshold = 1 / count if p["threshold"] is None else p["threshold"]
  similarity = np.where(stop(similarity) < threshold, 0, similarity)
  weights = similarity / np.sum(similarity, -1, keepdims=True)
  grouped = normed(np.einsum("btp,bpd->btd", weights, patches))
  words = normed(tokens)

  def direction(a, b):
    logits = np.where(mask[:, None], scale * np.einsum("btd,bud->btu", a, b), -np.inf)
    losses = log_sum_exp(logits) - scale * np.sum(a * b, -1)
    return np.sum(losses[mask]) / mask.sum()

  vl, lv = direction(grouped, words), direction(words, grouped)
  fine, whole = (vl + lv) / 2, clip(x, s, {})["loss"]
  return dict(
    loss=p["w_global"] * whole + p["w_fine"] * fine, global_=whole, fine=fine, vl=vl, lv=lv
  )


def coca_caption(x, s, p):
  """Mean cross-entropy of the tokens that are not padding (CoCa, Yu et al. 2022)."""
  real = x["labels"] != p["pad_id"]
  own = np.take_along_axis(log_softmax(x["logits"]), x["labels"][..., None], -1)[..., 0]
  return dict(loss=-p["weight"] * np.sum(own[real]) / real.sum(), n_tokens=float(real.sum()))


def cloc_region(x, s, p):
  """Contrast of regions and phrases over all images (CLOC, Chen et al. 2024).

  A phrase with the anchor's id is not a negative of it.
  """
  width = x["regions"].shape[-1]
  real = x["mask"].reshape(-1) > 0
  regions, phrases = (x[k].reshape(-1, width)[real] for k in ("regions", "phrases"))
  phrase_id = x["phrase_id"].reshape(-1)[real]
  kept = (phrase_id[:, None] != phrase_id) | np.eye(len(phrase_id), dtype=bool)
  logits = np.exp(s["log_scale"]) * regions @ phrases.T

  def direction(z):
    return np.mean(log_sum_exp(np.where(kept, z, -np.inf)) - np.diag(z))

  r2t, t2r = direction(logits), direction(logits.T)
  return dict(loss=(r2t + t2r) / 2, r2t=r2t, t2r=t2r)


# The inputs by which each loss is differentiated, and of which `normalize` makes unit rows.
FEATURES = (
  "img",
  "txt",
  "txt_long",
  "txt_syn",
  "patches",
  "tokens",
  "logits",
  "regions",
  "phrases",
)
NOT_NORMED = ("patches", "tokens", "logits")
STATELESS = {
  f.__name__: f
  for f in (
    clip,
    siglip,
    sail,
    nitc,
    focal_itc,
    unicl,
    clip_intra_neg,
    clip_gap,
    cyclip,
    alignclip,
    clip_distill,
    mobileclip_dr,
    siglip_distill,
    m3mix,
    m3co,
    softclip_m3co,
    matryoshka,
    sparc,
    coca_caption,
    cloc_region,
  )
}


def stateless(case, inputs):
  """{name: value} of a case without state: loss, parts, d_input and d_scalar."""
  formula, scalars, params = STATELESS[case["loss"]], case["scalars"], case["params"]

  def value(learned):
    x = {**inputs, **{k: v for k, v in learned.items() if k in inputs}}
    if case["normalize"]:
      x |= {k: normed(v) for k, v in x.items() if k in FEATURES and k not in NOT_NORMED}
    return formula(x, {k: learned[k] for k in scalars}, params)

  learned = {**{k: x for k, x in inputs.items() if k in FEATURES}, **scalars}
  gradients = derivatives(value, learned)
  return {
    **{k: float(stop(x)) for k, x in value(learned).items()},
    **{f"d_{k}": float(x) if x.ndim == 0 else x for k, x in gradients.items()},
  }


# --- losses with a state per sample -------------------------------------------------------------


def negatives(own, other, tau, diagonal):
  """Exponents of every anchor: all, those that count, log of the mean of their exponentials.

  own, other: [B, D]; tau: [B]. The exponent of anchor i and member k is the difference between
  their cosine and the cosine of the pair i, divided by tau_i. With `diagonal` the pair itself
  counts too; the divisor is B - 1 either way.
  """
  cosines = own @ other.T
  exponents = (cosines - np.diag(cosines)[:, None]) / tau[:, None]
  counted = exponents if diagonal else np.where(off_diagonal(len(own)), exponents, -np.inf)
  return exponents, counted, log_sum_exp(counted) - np.log(len(own) - 1)


def written(table, ids, values):
  """A copy of the table with new values; of an id that comes twice the last value stays."""
  table = table.copy()
  for i, value in zip(ids, values):
    table[i] = value
  return table


def mixed_average(log_u, log_g, gamma):
  """log of (1 - gamma) u + gamma g."""
  with np.errstate(divide="ignore"):
    return np.logaddexp(np.log1p(-gamma) + log_u, np.log(gamma) + log_g)


def sides(inputs):
  """(name, anchors, members, ids) of both directions."""
  yield "img", inputs["img"], inputs["txt"], inputs["img_ids"]
  yield "txt", inputs["txt"], inputs["img"], inputs["txt_ids"]


def feature_gradients(case, inputs, value):
  """value: loss of (img, txt), which are unit rows already where the case normalises."""
  learned = {k: inputs[k] for k in ("img", "txt")}
  prepare = normed if case["normalize"] else np.asarray
  return derivatives(lambda z: dict(loss=value({k: prepare(x) for k, x in z.items()})), learned)


def prepared(case, inputs):
  if not case["normalize"]:
    return inputs
  return inputs | {k: normed(inputs[k]) for k in ("img", "txt")}


def eta(p, epoch):
  """The learning rate of the temperatures of iSogCLR."""
  span = p["eta_init"] - p["eta_min"]
  return dict(
    const=p["eta_init"],
    cosine=p["eta_min"] + span * np.cos(np.pi * epoch / (2 * EPOCHS)),
    exp=p["eta_min"] + span * p["eta_exp_gamma"] ** (epoch - 1),
  )[p["eta_sched"]]


def sogclr_start(case):
  n, tau = case["data_size"], case["params"]["tau_init"]
  return {
    side: dict(log_u=np.full(n, -np.inf), b=np.zeros(n), m=np.zeros(n), tau=np.full(n, float(tau)))
    for side in ("img", "txt")
  }


def sogclr(case, inputs, state, step):
  """SogCLR (Yuan et al. 2022) and iSogCLR (Qiu et al. 2023), of two modalities."""
  p, x = case["params"], prepared(case, inputs)
  n, weights, results, state = len(x["img"]), {}, {}, {k: dict(v) for k, v in state.items()}
  objective = 0.0
  for side, own, other, ids in sides(x):
    table = state[side]
    tau = table["tau"][ids]
    exponents, counted, log_g = negatives(own, other, tau, p["include_diag"])
    table["b"] = written(table["b"], ids, np.maximum(table["b"][ids], counted.max(1)))
    old = table["log_u"][ids]
    new = mixed_average(old, log_g, p["gamma"])
    if p["init_first_visit"]:
      new = np.where(np.isneginf(old), log_g, new)
    table["log_u"] = written(table["log_u"], ids, new)
    log_u, b = table["log_u"][ids], table["b"][ids]
    with np.errstate(divide="ignore"):
      log_den = np.logaddexp(log_u, np.log(p["eps"]) + b)
    w = np.where(off_diagonal(n), np.exp(exponents - log_den[:, None]), 0) / (n - 1)
    weights[side] = w
    objective += np.mean(tau * (log_u + p["rho"]))
    if p["learn_tau"]:
      q = log_u + p["rho"] - np.sum(w * exponents, 1)
      q = np.clip(q, -p["grad_clip"], p["grad_clip"])
      m = (1 - p["beta_u"]) * table["m"][ids] + p["beta_u"] * q
      moved = np.clip(tau - eta(p, step) * m, p["tau_min"], p["tau_max"])
      table["m"], table["tau"] = written(table["m"], ids, m), written(table["tau"], ids, moved)
      results["eta"] = eta(p, step)

  def loss(z):
    cosines = z["img"] @ z["txt"].T
    own = np.diag(cosines)[:, None]
    return np.sum(weights["img"] * (cosines - own) + weights["txt"] * (cosines.T - own)) / n

  results |= dict(loss=float(loss(x)), objective=float(objective))
  results |= {f"d_{k}": g for k, g in feature_gradients(case, inputs, loss).items()}
  for side, table in state.items():
    results[f"state_log_u_{side}"], results[f"state_b_{side}"] = table["log_u"], table["b"]
    results[f"state_s_{side}"] = np.exp(table["log_u"] - table["b"])
    if p["learn_tau"]:
      results[f"state_m_{side}"], results[f"state_tau_{side}"] = table["m"], table["tau"]
  return results, state


def unimodal_start(case):
  return np.zeros(case["data_size"])


def sogclr_unimodal(case, inputs, state, step):
  """SogCLR of two views (Yuan et al. 2022): negatives are the other rows of both views."""
  p, x, ids = case["params"], prepared(case, inputs), inputs["img_ids"]
  n = len(ids)
  others = np.concatenate([off_diagonal(n)] * 2, 1)
  old = state[ids]
  gamma = p["gamma"] if old.any() else 1.0

  def cosines(own, other):
    return np.concatenate([own @ other.T, own @ own.T], 1)

  weights, averages = {}, []
  for side, other in (("img", "txt"), ("txt", "img")):
    exponentials = np.where(others, np.exp(cosines(x[side], x[other]) / p["tau"]), 0)
    u = (1 - gamma) * old + gamma * exponentials.sum(1) / (2 * (n - 1))
    averages.append(u)
    weights[side] = exponentials / u[:, None] / (2 * (n - 1))

  def loss(z):
    positive = 2 * np.sum(z["img"] * z["txt"])
    among = sum(
      np.sum(weights[side] * cosines(z[side], z[other]))
      for side, other in (("img", "txt"), ("txt", "img"))
    )
    return (among - positive) / n

  state = written(state, ids, np.mean(averages, 0))
  gradients = feature_gradients(case, inputs, loss)
  return dict(
    loss=float(loss(x)), **{f"d_{k}": g for k, g in gradients.items()}, state_u=state
  ), state


def gamma_at(epoch, end, epochs, schedule="cosine"):
  """FastCLIP's schedule of the moving average: 1 in the first epoch, `end` from `epochs` on."""
  if epoch == 0:
    return 1.0
  if epoch >= epochs or schedule == "constant":
    return end
  return 0.5 * (1 + np.cos(np.pi * epoch / epochs)) * (1 - end) + end


def fastclip_start(case):
  n, p = case["data_size"], case["params"]
  return {
    side: dict(
      log_u=np.full(n, -np.inf),
      b=np.zeros(n),
      m=np.zeros(n),
      v=np.zeros(n),
      tau=np.full(n, float(p.get("tau_init", 1))),
    )
    for side in ("img", "txt")
  }


def fastclip(case, inputs, state, step):
  """FastCLIP v0, v1, v2 and v3 (Wei et al. 2024). Step k is epoch k."""
  p, x = case["params"], prepared(case, inputs)
  n, state = len(x["img"]), {k: dict(v) for k, v in state.items()}
  over_tau, plain = {}, {}  # weights without and with RGCL's factor tau of each sample
  per_sample = "tau_init" in p
  gamma = gamma_at(step, p["gamma"], p["gamma_decay_epochs"], p["gamma_schedule"])
  ratio = sum_of_h = mean_log = mean_log_eps = 0.0
  for side, own, other, ids in sides(x):
    table = state[side]
    tau = table["tau"][ids] if per_sample else np.full(n, np.exp(-p["log_scales"][step]))
    exponents, _, log_g = negatives(own, other, tau, False)
    old, bound = table["log_u"][ids], np.zeros(n)
    stored = old - table["b"][ids]
    if per_sample:
      bound = np.maximum(table["b"][ids], exponents.max(1))
    log_u = mixed_average(old, log_g, gamma)
    log_u = np.where(stored < np.log(1e-35), log_g, log_u)
    log_den = np.logaddexp(log_u, np.log(p["eps"]) + bound)
    w = np.where(off_diagonal(n), np.exp(exponents - log_den[:, None]), 0) / (n - 1)
    h = np.sum(w * exponents, 1)
    over_tau[side], plain[side] = w / (2 * tau[:, None]), w / 2
    ratio += np.mean(np.exp(log_g - log_den))
    sum_of_h += np.mean(h)
    mean_log += np.mean(log_u)
    mean_log_eps += np.mean(log_den)
    table["log_u"] = written(table["log_u"], ids, log_u)
    table["b"] = written(table["b"], ids, bound)
    if per_sample:
      q = np.clip(log_den + p["rho"] - h, -p["grad_clip"], p["grad_clip"])
      b1, b2 = (p["beta1"], p["beta2"]) if step else (0.0, 0.0)
      m = b1 * table["m"][ids] + (1 - b1) * q
      v = b2 * table["v"][ids] + (1 - b2) * q * q
      m_hat, v_hat = m / (1 - b1 ** (step + 1)), v / (1 - b2 ** (step + 1))
      moved = tau - p["lr_tau"] * m_hat / (np.sqrt(v_hat) + p["eps_tau"])
      moved = np.clip(moved, p["tau_min"], p["tau_max"])
      for name, values in (("m", m), ("v", v), ("tau", moved)):
        table[name] = written(table[name], ids, values)

  def loss(z, weights):
    cosines = z["img"] @ z["txt"].T
    own = np.diag(cosines)[:, None]
    return np.sum(weights["img"] * (cosines - own) + weights["txt"] * (cosines.T - own)) / n

  def gradients(kind, weights):
    results = feature_gradients(case, inputs, lambda z: loss(z, weights))
    return {f"d_{k}__{kind}": g for k, g in results.items()}

  results = dict(gamma=gamma, loss_reported=float(ratio))
  if per_sample:
    results |= gradients("released", over_tau) | gradients("rgcl", plain)
    for side, table in state.items():
      results[f"state_u_{side}"] = np.exp(table["log_u"] - table["b"])
      results[f"state_log_u_{side}"], results[f"state_bound_{side}"] = table["log_u"], table["b"]
      results[f"state_adam_m_{side}"], results[f"state_adam_v_{side}"] = table["m"], table["v"]
      results[f"state_tau_{side}"] = table["tau"]
    return results, state
  if p["version"] == "v3":
    tau = np.exp(-p["log_scales"][step])
    results["loss_reported"] = float(tau * (ratio + p["rho"] + mean_log / 2))
    results["objective"] = float(tau / 2 * (mean_log_eps + 2 * p["rho"]))
    results["d_log_scale__released"] = float(-tau / 2 * (mean_log + 2 * p["rho"] - 2 * sum_of_h))
    results["d_log_scale__consistent"] = float(-tau / 2 * (mean_log_eps + 2 * p["rho"] - sum_of_h))
  else:
    results["objective"] = float(mean_log_eps / 2)
    results["d_log_scale__released"] = float(sum_of_h)
    results["d_log_scale__consistent"] = float(sum_of_h / 2)
  results |= gradients("released", plain if p["version"] == "v3" else over_tau)
  for side, table in state.items():
    results[f"state_u_{side}"] = np.exp(table["log_u"])
  return results, state


def albef_start(case):
  return None


def albef_itc(case, inputs, state, step):
  """Momentum distillation with queues (ALBEF, Li et al. 2021)."""
  p, n = case["params"], len(inputs["img"])
  if state is None:
    state = {k: inputs[k] for k in inputs if k.startswith("queue_")} | dict(next=0)
  temperature, alpha = np.clip(p["temps"][step], 0.001, 0.5), p["alphas"][step]
  keys = {k: np.concatenate([inputs[f"t_{k}"], state[f"queue_{k}"]]) for k in ("img", "txt")}
  truth = np.eye(n, len(keys["img"]))
  if "ids" in inputs:
    every = np.concatenate([inputs["ids"], state["queue_ids"]])
    truth = (inputs["ids"][:, None] == every).astype(np.float64)
    truth /= truth.sum(1, keepdims=True)

  def direction(anchors, teacher, keys, temperature):
    targets = softmax(teacher @ keys.T / stop(temperature))
    return cross_entropy(alpha * targets + (1 - alpha) * truth, anchors @ keys.T / temperature)

  def value(z):
    i2t = direction(z["img"], inputs["t_img"], keys["txt"], z["temp"])
    t2i = direction(z["txt"], inputs["t_txt"], keys["img"], z["temp"])
    return dict(loss=(i2t + t2i) / 2, i2t=i2t, t2i=t2i)

  learned = dict(img=inputs["img"], txt=inputs["txt"], temp=np.asarray(temperature))
  results = {k: float(stop(x)) for k, x in value(learned).items()}
  results |= {f"d_{k}": g for k, g in derivatives(value, learned).items()}
  results["d_temp"] = float(results["d_temp"])
  size, state = len(state["queue_img"]), dict(state)
  places = (state["next"] + np.arange(n)) % size
  for name in ("img", "txt", "ids"):
    if f"queue_{name}" in state:
      new = inputs["ids" if name == "ids" else f"t_{name}"]
      state[f"queue_{name}"] = written(state[f"queue_{name}"], places, new)
  state["next"] = (state["next"] + n) % size
  results["queue_ptr"] = state["next"]
  results |= {f"state_queue_{k}": state[f"queue_{k}"] for k in ("img", "txt")}
  return results, state


STATEFUL = dict(
  sogclr=(sogclr_start, sogclr),
  isogclr=(sogclr_start, sogclr),
  sogclr_unimodal=(unimodal_start, sogclr_unimodal),
  fastclip_v0=(fastclip_start, fastclip),
  fastclip_v1=(fastclip_start, fastclip),
  fastclip_v2=(fastclip_start, fastclip),
  fastclip_v3=(fastclip_start, fastclip),
  albef_itc=(albef_start, albef_itc),
)


# --- measures of an embedding -------------------------------------------------------------------


def effective_rank(x):
  """exp of the entropy of the normalised singular values (Roy and Vetterli 2007)."""
  p = np.linalg.svd(x, compute_uv=False)
  p = p[p > 0] / p.sum()
  return np.exp(-np.sum(p * np.log(p)))


def linear_cka(x, y):
  """Kornblith et al. 2019."""
  x, y = x - x.mean(0), y - y.mean(0)
  return np.linalg.norm(x.T @ y) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


def logistic_regression(x, labels, c):
  """Newton's method on |w|^2 / 2 + c sum of log-losses, free intercept: (w, intercept, minimum)."""
  features = np.concatenate([x, np.ones((len(x), 1))], 1)
  prior = np.diag([1.0] * x.shape[1] + [0.0])
  w = np.zeros(features.shape[1])
  for _ in range(100):
    p = sigmoid(features @ w)
    gradient = prior @ w + c * features.T @ (p - labels)
    hessian = prior + c * (features.T * (p * (1 - p))) @ features
    w = w - np.linalg.solve(hessian, gradient)
  signs = np.where(labels, -1, 1)
  minimum = w @ prior @ w / 2 + c * stop(softplus(signs * (features @ w))).sum()
  return w[:-1], w[-1], minimum


def metrics(case, inputs):
  """Measures of the geometry of two modalities."""
  img, txt = (inputs[k] for k in ("img", "txt"))
  if case["normalize"]:
    img, txt = normed(img), normed(txt)
  t, both, n = case["params"]["uniformity_t"], np.concatenate([img, txt]), len(img)
  mean_img, mean_txt = img.mean(0), txt.mean(0)
  cosines, apart = img @ txt.T, img - txt
  results = dict(
    centroid_distance=np.linalg.norm(mean_img - mean_txt),
    centroid_cosine=normed(mean_img) @ normed(mean_txt),
    mean_pair_distance=np.linalg.norm(apart, axis=1).mean(),
    mean_pair_cosine=np.diag(cosines).mean(),
    alignment=(apart**2).sum(1).mean(),
    uniformity_img=uniformity(img, t),
    uniformity_txt=uniformity(txt, t),
    xuniformity=cross_uniformity(img, txt, t),
    uniformity_joint=uniformity(both, t),
    effective_rank_joint=effective_rank(both),
    linear_cka=linear_cka(img, txt),
  )
  results["uniformity"] = (results["uniformity_img"] + results["uniformity_txt"]) / 2
  for name, x in (("img", img), ("txt", txt)):
    results[f"mean_offdiag_cosine_{name}"] = (x @ x.T)[off_diagonal(n)].mean()
    results[f"effective_rank_{name}"] = effective_rank(x)
    results[f"effective_rank_{name}_centered"] = effective_rank(x - x.mean(0))
  own = np.diag(cosines)[:, None]
  for name, z in (("i2t", cosines), ("t2i", cosines.T)):
    for k in (1, 5, 10):
      results[f"{name}_recall@{k}"] = np.mean((z > own).sum(1) < k)
  train, test = (np.array(case["params"]["split"][k]) for k in ("train", "test"))

  def of(rows):
    return np.concatenate([img[rows], txt[rows]]), np.repeat([0, 1], len(rows))

  w, intercept, minimum = logistic_regression(*of(train), case["params"]["logreg_C"])
  x, labels = of(test)
  results |= dict(
    linsep_test_accuracy=np.mean((x @ w + intercept > 0) == labels),
    linsep_train_objective=minimum,
    linsep_weight_norm=np.linalg.norm(w),
    linsep_intercept=intercept,
  )
  return {k: float(x) for k, x in results.items()}
