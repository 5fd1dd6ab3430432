"""Tokens of the image tower approach those of a teacher: the averaged tower, or another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from bigalign import checks
from bigalign.losses.base import Loss
from bigalign.losses.feature_distill import KINDS, distance
from bigalign.losses.heads import masks
from bigalign.losses.heads.base import Head, Params, Read, mean_loss
from bigalign.losses.heads.layers import dense, dense_init
from bigalign.towers.base import Block, TowerOutput

HIDDEN_FROM = ("student", "teacher")
TEACHERS = ("averaged", "frozen")
HIDDEN_BY = ("vector", "drop")
MASKS = ("uniform", "blocks", "kept_blocks")
SPACES = ("tokens", "embeddings")
RATIOS = {"vector": 0.4, "drop": 0.5}


def regression(
  tokens: jax.Array, teacher: jax.Array, counts: jax.Array, kind: str
) -> dict[str, jax.Array]:
  """Regression of tokens to a teacher's tokens at the same places: "sum" and "count" [b].

  Args:
    tokens: [b, N, D].
    teacher: [b, N, D]; it gets no gradient.
    counts: [b, N] bool, which tokens count.
    kind: as of feature_distill.distance.
  """
  wide = jnp.promote_types(tokens.dtype, jnp.float32)
  each = distance(tokens.astype(wide), teacher.astype(wide), kind)
  return {"sum": jnp.where(counts, each, 0).sum(1), "count": counts.sum(1)}


def token_distill(
  *,
  teacher: str = "averaged",
  hidden_from: str = "student",
  hidden_by: str = "vector",
  kind: str = "cosine",
  space: str = "tokens",
  ratio: float | None = None,
  mask: str = "uniform",
  decoder: int = 2,
  heads: int = 0,
) -> Loss:
  """Regression of tokens to those of a teacher: the averaged tower, or config.teacher.

  With config.twin.decay=1 the averaged tower is the tower that the run began with, such as CLIP's.
  The teacher sees the same crop as the tower, resized for it, with its own normalisation. Its
  tokens are those after its last norm.

  hidden_from="student", hidden_by="vector", as EVA, https://arxiv.org/abs/2211.07636: the tower
  sees a learned vector in place of some patches, and a linear map of its tokens there comes close
  to the tokens of the teacher, which sees the whole image. EVA trains a new tower from a frozen
  CLIP: teacher="frozen", mask="blocks"; it hides 105 of 256 patches, ratio=0.41.

  hidden_from="student", hidden_by="drop", as UTA, https://arxiv.org/abs/2405.19009: the tower sees
  some patches alone, as in FLIP, and their tokens come close to those of the teacher at the same
  places. With space="embeddings" both go through their projectors, so that images of the tower can
  be compared with texts of the teacher's text tower. Its share of patches and the shape of
  its masks were not checked against the paper: ratio=0.5, mask="kept_blocks".

  hidden_from="teacher", as locality alignment (MaskEmbed), https://arxiv.org/abs/2410.11087: the
  tower sees the whole image. Its tokens, of which some are then set to 0, go through a small
  decoder, which predicts all tokens of a teacher that does not see these patches. A random share of
  the patches is hidden; the same image also counts with the others hidden, and with none. The
  release takes the tokens before the teacher's last block and hides pixels; here they are the
  tower's output, and the embedding of hidden patches is 0.

  Args:
    teacher: "averaged": the averaged tower, of config.twin. "frozen": config.teacher.
    hidden_from: "student" or "teacher".
    hidden_by: how patches are hidden from the student. "vector": a learned vector replaces them,
      and they count. "drop": they are left out, and the others count.
    kind: "cosine", "mse" or "cosine+mse" as of `feature_distill`; EVA and UTA take the cosine,
      locality alignment "mse".
    space: "tokens": a linear map of the tower's tokens is compared with the teacher's tokens.
      "embeddings": tokens of both are compared after their projectors, without a layer in between.
    ratio: share of the patches that are hidden from the student, more than 0 and less than 1; None:
      0.4 with hidden_by="vector", 0.5 with "drop".
    mask: which patches are hidden from the student: "uniform": any. "blocks": rectangles, as in
      BEiT. "kept_blocks": those outside of such rectangles.
    decoder: blocks of the decoder of hidden_from="teacher".
    heads: attention heads of these blocks; 0: one for 64 units of the width.

  Raises:
    ValueError: for an unknown name, a number out of range, or options that exclude each other.
  """
  where = "config.loss.token_distill"
  checks.known(f"{where}.teacher", teacher, TEACHERS)
  checks.known(f"{where}.hidden_from", hidden_from, HIDDEN_FROM)
  checks.known(f"{where}.hidden_by", hidden_by, HIDDEN_BY)
  checks.known(f"{where}.kind", kind, KINDS)
  checks.known(f"{where}.space", space, SPACES)
  checks.known(f"{where}.mask", mask, MASKS)
  share = RATIOS[hidden_by] if ratio is None else ratio
  if not 0 < share < 1:
    raise ValueError(f"{where}.ratio={ratio}: more than 0 and less than 1")
  of_student = (hidden_by, mask, space)
  if hidden_from == "teacher" and of_student != ("vector", "uniform", "tokens"):
    raise ValueError(
      f"{where}: hidden_by={hidden_by!r}, mask={mask!r} and space={space!r} are options of"
      " hidden_from='student'; leave them out, or set it"
    )
  checks.between(where, 1, decoder=decoder)
  checks.between(where, 0, heads=heads)

  def hidden(key: jax.Array, batch: int, size: tuple[int, int]) -> tuple[jax.Array, int]:
    """[B, N] bool: the places that are hidden from the student; and how many of a row are not."""
    total = size[0] * size[1]
    if mask == "kept_blocks":
      return ~masks.blocks(key, batch, size, 1 - share), round((1 - share) * total)
    left = total - round(share * total)
    if mask == "blocks":
      return masks.blocks(key, batch, size, share), left
    return masks.uniform(key, batch, total, share), left

  def draw(
    key: jax.Array, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, Any]
  ) -> dict[str, jax.Array]:
    shape = shapes["image"]
    size = masks.grid(shape, sizes)
    if hidden_from == "student":
      places, left = hidden(key, shape[0], size)
      if hidden_by == "vector":
        return {"hidden": places}
      return {"kept": masks.ascending(~places, max(1, left))}
    # The share is uniform too: https://arxiv.org/abs/2410.11087.
    of_image, of_patch = jax.random.split(key)
    least = jax.random.uniform(of_image, (shape[0], 1))
    return {"hidden": jax.random.uniform(of_patch, (shape[0], size[0] * size[1])) <= least}

  def target(read: Read, images: jax.Array, places: jax.Array | None = None) -> jax.Array:
    """[b, N, D]: the teacher's tokens, without these patches."""
    if teacher == "frozen":
      tokens = read.teacher(images, hidden=places, projected=space == "embeddings")
    else:
      zero = jnp.zeros((read.features["tokens_img"].shape[-1],), jnp.float32)
      vector = None if places is None else (places, zero)
      output = read.image(images, averaged=True, hidden=vector)
      tokens = read.projected(output, averaged=True) if space == "embeddings" else output.tokens
    count = masks.patches(images.shape, read.sizes)
    if tokens.shape[1] != count:
      raise ValueError(
        f"{where}: the teacher makes {tokens.shape[1]} tokens of an image, and the model has"
        f" {count} patches. Their grids must be equal: set config.teacher.image_size to 0, or to a"
        " size that gives as many patches, and pool to another one than 'queries'"
      )
    return tokens

  def compared(params: Params, read: Read, output: TowerOutput) -> jax.Array:
    """[b, n, D]: what is compared with the teacher's tokens."""
    if space == "embeddings":
      return read.projected(output)
    return dense(params["out"], output.tokens)

  def block(width: int, dtype: Any) -> Block:
    return Block(heads or max(1, width // 64), 4 * width, dtype=dtype)

  def init_head(key: jax.Array, read: Read) -> Params:
    tokens = read.features["tokens_img"]
    _, count, width = tokens.shape
    theirs = target(read, read.batch["image"]).shape[-1]
    keys = jax.random.split(key, decoder + 2)
    linear = dense_init(keys[0], width, theirs)
    noise = jax.random.normal(keys[1], (count, width), jnp.float32)
    if hidden_from == "student":
      vector = {"vector": 0.02 * noise[0]} if hidden_by == "vector" else {}
      if space == "tokens":
        return vector | {"out": linear}
      ours = read.projected().shape[-1]
      if ours != theirs:
        raise ValueError(
          f"{where}.space='embeddings': those of the model are {ours} wide, those of the teacher"
          f" {theirs}; set config.model.embed_dim to {theirs}, or space='tokens'"
        )
      return vector
    blocks = {
      f"block_{i}": block(width, jnp.float32).init(one, tokens.astype(jnp.float32))["params"]
      for i, one in enumerate(keys[2:])
    }
    return {"positions": 0.02 * noise, "out": linear, **blocks}

  def decoded(params: Params, x: jax.Array) -> jax.Array:
    x = x + params["positions"].astype(x.dtype)[None]
    for i in range(decoder):
      x, _ = block(x.shape[-1], x.dtype).apply({"params": params[f"block_{i}"]}, x)
    return dense(params["out"], x)

  def apply_head(params: Params, averaged: Params, read: Read) -> dict[str, jax.Array]:
    image = read.batch["image"]
    if hidden_from == "student" and hidden_by == "vector":
      places = read.batch["hidden"]
      own = read.image(image, hidden=(places, params["vector"]))
      return regression(compared(params, read, own), target(read, image), places, kind)
    if hidden_from == "student":
      at = read.batch["kept"]
      own = read.image(image, kept=at)
      theirs = jnp.take_along_axis(target(read, image), at[..., None], axis=1)
      return regression(compared(params, read, own), theirs, jnp.ones_like(at, bool), kind)
    # With these patches hidden, with the others, and with none: [3 b, N].
    places = read.batch["hidden"]
    three = jnp.concatenate([places, ~places, jnp.zeros_like(places)])
    tokens = jnp.concatenate([read.features["tokens_img"]] * 3)
    predicted = decoded(params, jnp.where(three[..., None], 0, tokens))
    theirs = target(read, jnp.concatenate([image] * 3), three)
    found = regression(predicted, theirs, jnp.ones_like(three), kind)
    return {name: rearrange(x, "(m b) -> b m", m=3).sum(1) for name, x in found.items()}

  head = Head(
    init_head,
    apply_head,
    fields=frozenset({"image"}),
    draw=draw,
    averages=teacher == "averaged",
    teacher=teacher == "frozen",
  )
  return Loss(frozenset(), lambda sizes: ({}, {}), mean_loss, pair=False, head=head)
