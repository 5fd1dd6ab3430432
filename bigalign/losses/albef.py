"""Contrast with the averaged model's features, and with a queue of earlier ones (ALBEF)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bigalign import checks
from bigalign.losses.base import Loss
from bigalign.losses.engine import pairwise

NO_ID = 0xFFFFFFFF  # both words of the id of an empty position in the queue


def albef_itc(
  *,
  temperature_init: float = 0.07,
  alpha: float = 0.4,
  queue_size: int = 65536,
  positives: str = "pair",
  local_keys: int | None = None,
) -> Loss:
  """Image-text contrast of ALBEF, with momentum distillation: https://arxiv.org/abs/2107.07651.

  The candidates (keys) are features of the averaged parameters (config.ema; ALBEF's decay is
  0.995): those of the batch, and those of a queue of earlier batches, in which new keys replace the
  oldest. The targets mix the true pairs with the averaged model's softmax over the same keys. Only
  the anchors and the temperature get a gradient.

  Args:
    temperature_init: first value of the learned "temperature", which stays in [0.001, 0.5].
    alpha: share of the averaged model's softmax in the targets; it rises linearly from 0 in the
      first epoch.
    queue_size: number of keys of each modality in the queue, a multiple of the batch size; the
      first keys are random unit vectors.
    positives: "pair": the key of the same pair. "ids": all keys of the same image, in equal parts,
      as in the paper's fine-tuning for retrieval.
    local_keys: None: the keys of the whole batch. A number: only the keys of blocks of that many
      neighbours in the batch, and the queue, as in the release, where they are those of one worker.
      The larger set of negatives is our default.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)
    >>> feats = {"zimg": z, "ztxt": z, "teacher_img": z, "teacher_txt": z}
    >>> metrics = apply_once(albef_itc(queue_size=4), feats, sizes={"embed": 4})
    >>> float(metrics["loss"]) > 0, float(metrics["alpha"])
    (True, 0.0)
  """
  checks.known("config.loss.albef_itc.positives", positives, ("pair", "ids"))
  checks.between("config.loss.albef_itc", 1, queue_size=queue_size)
  if local_keys is not None:
    checks.between("config.loss.albef_itc", 1, local_keys=local_keys)
  checks.between("config.loss.albef_itc", 0, 1, alpha=alpha)
  checks.between("config.loss.albef_itc", 0.001, 0.5, temperature_init=temperature_init)

  def init(sizes):
    shape = (2, queue_size, sizes["embed"])
    keys = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    keys /= jnp.linalg.norm(keys, axis=-1, keepdims=True)
    state = {"img": keys[0], "txt": keys[1], "next": jnp.zeros((), jnp.int32)}
    if positives == "ids":
      state["ids"] = jnp.full((queue_size, 2), NO_ID, jnp.uint32)
    return {"temperature": jnp.asarray(temperature_init, jnp.float32)}, state

  def apply(params, state, feats, batch, context):
    size = len(feats["zimg"])
    if queue_size % size:
      raise ValueError(
        f"config.loss.albef_itc.queue_size={queue_size} is not a multiple of the batch size {size};"
        f" try {-(-queue_size // size) * size}"
      )
    new = {side: jax.lax.stop_gradient(feats[f"teacher_{side}"]) for side in ("img", "txt")}
    if positives == "ids":
      new["ids"] = batch["image_id"]
    share = alpha * jnp.minimum(context.epochs, 1.0).astype(feats["zimg"].dtype)
    shared = {"temperature": params["temperature"], "alpha": share}

    def keys(arrays, side):
      ids = {"id": arrays["ids"]} if positives == "ids" else {}
      return {"key": arrays[side], **ids}

    i2t, t2i = (
      _cross_entropy(
        feats[f"z{own}"],
        new[own],
        keys(new, other),
        keys(state, other),
        shared,
        local_keys or size,
        context.engine,
      )
      for own, other in (("img", "txt"), ("txt", "img"))
    )
    loss = (i2t + t2i) / 2
    logs = {"i2t": i2t, "t2i": t2i, **shared}
    return loss, (
      _enqueue(state, new, context.engine),
      {"loss": loss, "contrastive_loss": loss, **logs},
    )

  def constrain(params, before):
    return {**params, "temperature": jnp.clip(params["temperature"], 0.001, 0.5)}

  needs = {"ema_teacher", *(("ids",) if positives == "ids" else ())}
  return Loss(frozenset(needs), init, apply, constrain)


def whole_batches(batch: int) -> dict[str, int]:
  """Options of albef_itc for a batch size: the smallest queue of at least the default size."""
  return {"queue_size": -(-65_536 // batch) * batch}


def _enqueue(state, new, engine):
  """The queue with its oldest keys replaced by those of the batch."""
  start, length = state["next"], len(state["img"])
  queue = {name: state[name] for name in new}
  replaced = engine.replaced(queue, new, start)
  return {**replaced, "next": (start + len(new["img"])) % length}


def _cross_entropy(z, teacher, keys, queue, shared, group, engine):
  """[]: the cross-entropy of anchors to the mixed targets.

  Args:
    z: [B, E], the anchors.
    teacher: [B, E], the averaged model's features of the anchors.
    keys: "key" [B, E] of the anchors, and "id" [B, 2] if keys with equal ids are positives.
    queue: likewise of earlier batches, [K, E] and [K, 2].
    shared: "temperature" and "alpha".
    group: number of neighbours in the batch that use each other's keys.
    engine: forms the logits.
  """

  def over_all_keys(tile, kinds, anchors, shared, fixed):
    """{name: [B]}: reductions of a tile over the keys of the batch and those of the queue.

    The queue is longer than the batch. Its keys are the rows, which stay on their device.
    """

    def of_queue(row, col, shared):
      return {name: v.T for name, v in tile(col, row, shared, in_batch=False).items()}

    def of_batch(row, col, shared):
      return tile(row, col, shared, in_batch=True)

    by_row, by_column = ({k: f"{side}_{x}" for k, x in kinds.items()} for side in ("row", "col"))
    near = engine.reduce(of_batch, anchors, keys, shared, outputs=by_row, fixed=fixed)
    early = engine.reduce(of_queue, queue, anchors, shared, outputs=by_column, fixed=fixed)
    combined = {"lse": jnp.logaddexp, "sum": jnp.add}
    return {name: combined[kind](near[name], early[name]) for name, kind in kinds.items()}

  def targets(anchor, key, shared, in_batch):
    """Candidates, the anchors' own pairs, positives, and the averaged model's logits."""
    temperature = jax.lax.stop_gradient(shared["temperature"])
    logits = jax.lax.stop_gradient(engine.products(anchor["teacher"], key["key"])) / temperature
    if in_batch:
      block, of_key = anchor["batch_index"] // group, key["batch_index"] // group
      candidates = block[:, None] == of_key[None, :]
      own = pairwise.same(anchor, key)
    else:
      candidates, own = jnp.ones(logits.shape, bool), jnp.zeros(logits.shape, bool)
    match = own
    if "id" in key:
      match = candidates & (anchor["id"][:, None, :] == key["id"][None, :, :]).all(-1)
    return candidates, own, match, jnp.where(candidates, logits, -jnp.inf)

  def counts(anchor, key, shared, in_batch):
    _, _, match, logits = targets(anchor, key, shared, in_batch)
    return {"norm": logits, "matches": match.astype(logits.dtype)}

  anchors = {"teacher": teacher, **{name: x for name, x in keys.items() if name == "id"}}
  known = jax.lax.stop_gradient(
    over_all_keys(
      counts, {"norm": "lse", "matches": "sum"}, anchors, jax.lax.stop_gradient(shared), ()
    )
  )

  def tile(anchor, key, shared, in_batch):
    candidates, own, match, logits = targets(anchor, key, shared, in_batch)
    # Relative to the positive: absolute logits of 1 / temperature would round the loss away.
    difference = engine.products(anchor["z"], key["key"]) - anchor["positive"][:, None]
    z = difference / shared["temperature"]
    truth = match / anchor["matches"][:, None]
    soft = jnp.exp(logits - anchor["norm"][:, None])
    weighted = (shared["alpha"] * soft + (1 - shared["alpha"]) * truth) * z
    other = candidates & ~own
    return {"others": jnp.where(other, z, -jnp.inf), "weighted": jnp.where(other, weighted, 0)}

  reduced = over_all_keys(
    tile,
    {"others": "lse", "weighted": "sum"},
    anchors | known | {"z": z, "positive": engine.paired(z, keys["key"])},
    shared,
    {"teacher", "key", *known},
  )
  return (jax.nn.softplus(reduced["others"]) - reduced["weighted"]).mean()
