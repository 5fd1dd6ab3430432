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
  for name, value in (("queue_size", queue_size), ("local_keys", local_keys)):
    if value is not None and value < 1:
      raise ValueError(f"config.loss.albef_itc.{name}={value} must be at least 1")
  if not 0.001 <= temperature_init <= 0.5:
    raise ValueError(
      f"config.loss.albef_itc.temperature_init={temperature_init} is not between 0.001 and 0.5"
    )

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
    keys = {name: jnp.concatenate([x, state[name]]) for name, x in new.items()}
    share = alpha * jnp.minimum(context.epochs, 1.0).astype(feats["zimg"].dtype)
    shared = {"temperature": params["temperature"], "alpha": share}
    i2t, t2i = (
      _cross_entropy(
        feats[f"z{own}"],
        new[own],
        keys[other],
        keys.get("ids"),
        shared,
        local_keys or size,
        context.engine,
      )
      for own, other in (("img", "txt"), ("txt", "img"))
    )
    loss = (i2t + t2i) / 2
    logs = {"i2t": i2t, "t2i": t2i, **shared}
    return loss, (_enqueue(state, new), {"loss": loss, "contrastive_loss": loss, **logs})

  def constrain(params, before):
    return {**params, "temperature": jnp.clip(params["temperature"], 0.001, 0.5)}

  needs = {"ema_teacher", *(("ids",) if positives == "ids" else ())}
  return Loss(frozenset(needs), init, apply, constrain)


def whole_batches(batch: int) -> dict[str, int]:
  """Options of albef_itc for a batch size: the smallest queue of at least the default size."""
  return {"queue_size": -(-65_536 // batch) * batch}


def _enqueue(state, new):
  """The queue with its oldest keys replaced by those of the batch."""
  start = state["next"]
  queues = {
    name: jax.lax.dynamic_update_slice_in_dim(state[name], x.astype(state[name].dtype), start, 0)
    for name, x in new.items()
  }
  size, length = len(new["img"]), len(state["img"])
  return {**queues, "next": (start + size) % length}


def _cross_entropy(z, teacher, keys, ids, shared, group, engine):
  """[]: the cross-entropy of anchors to the mixed targets.

  Args:
    z: [B, E], the anchors.
    teacher: [B, E], the averaged model's features of the anchors.
    keys: [B + K, E], of which the first B belong to the anchors.
    ids: [B + K, 2] of the keys, or None.
    shared: "temperature" and "alpha".
    group: number of neighbours in the batch that use each other's keys.
    engine: forms the logits.
  """
  size = len(z)

  def targets(row, col, shared):
    """Which keys are candidates and which are positives, and the averaged model's logits."""
    near = row["batch_index"][:, None] // group == col["batch_index"][None, :] // group
    candidates = near | (col["batch_index"] >= size)[None, :]
    temperature = jax.lax.stop_gradient(shared["temperature"])
    logits = jax.lax.stop_gradient(engine.products(row["teacher"], col["key"])) / temperature
    match = candidates & pairwise.same(row, col)
    if ids is not None:
      match = candidates & (row["id"][:, None, :] == col["id"][None, :, :]).all(-1)
    return candidates, match, jnp.where(candidates, logits, -jnp.inf)

  def counts(row, col, shared):
    _, match, logits = targets(row, col, shared)
    return {"norm": logits, "matches": match.astype(logits.dtype)}

  rows, columns = {"teacher": teacher}, {"key": keys}
  if ids is not None:
    rows, columns = rows | {"id": ids[:size]}, columns | {"id": ids}
  known = jax.lax.stop_gradient(
    engine.reduce(
      counts,
      rows,
      columns,
      jax.lax.stop_gradient(shared),
      outputs={"norm": "row_lse", "matches": "row_sum"},
    )
  )

  def tile(row, col, shared):
    candidates, match, logits = targets(row, col, shared)
    # Relative to the positive: absolute logits of 1 / temperature would round the loss away.
    z = (engine.products(row["z"], col["key"]) - row["positive"][:, None]) / shared["temperature"]
    truth = match / row["matches"][:, None]
    own = jnp.exp(logits - row["norm"][:, None])
    weighted = (shared["alpha"] * own + (1 - shared["alpha"]) * truth) * z
    other = candidates & ~pairwise.same(row, col)
    return {"others": jnp.where(other, z, -jnp.inf), "weighted": jnp.where(other, weighted, 0)}

  positive = engine.paired(z, keys[:size])
  reduced = engine.reduce(
    tile,
    rows | known | {"z": z, "positive": positive},
    columns,
    shared,
    outputs={"others": "row_lse", "weighted": "row_sum"},
    fixed={"teacher", "key", *known},
  )
  return (jax.nn.softplus(reduced["others"]) - reduced["weighted"]).mean()
