"""CLOC's Prompter, FG-CLIP's negatives, GRAIN's queries: options, boxes, what is learned."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.loss_oracles import AT
from scipy.optimize import linear_sum_assignment

from bigalign import losses
from bigalign.data.fields.regions import (
  BOXES,
  MASK,
  NEGATIVES,
  NEGATIVES_COUNT,
  NEGATIVES_MASK,
  PHRASES,
  PHRASES_MASK,
)
from bigalign.losses.heads import boxes, prompter
from bigalign.losses.heads.base import Read
from bigalign.losses.heads.grain import COSTS, boxes_of, matched
from bigalign.losses.heads.region_phrase import cloc_region, own_phrase
from bigalign.sphere import unit
from bigalign.towers.base import Block, TowerOutput

WIDTH, EMBED, SIDE = 32, 16, 4  # of patches, of embeddings, patches along a side


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def some_boxes(*shape, seed=0):
  corners = np.random.default_rng(seed).uniform(size=(*shape, 2, 2))
  low, high = corners.min(-2), corners.max(-2)
  return jnp.asarray(np.concatenate([low, np.maximum(high, low + 0.05)], -1), jnp.float32)


def test_overlap_of_boxes():
  a = jnp.asarray([0.0, 0.0, 0.5, 0.5])
  b = jnp.asarray(
    [
      [0.0, 0.0, 0.5, 0.5],  # the same
      [0.25, 0.0, 0.75, 0.5],  # a third of the union, which fills the box around both
      [0.5, 0.5, 1.0, 1.0],  # a corner in common: half of the box around both is empty
      [0.0, 0.0, 0.0, 0.0],  # without an area, inside
    ]
  )
  for pair in ((a[None], b), (b, a[None])):
    np.testing.assert_allclose(boxes.generalized_iou(*pair), [1, 1 / 3, -0.5, 0], atol=1e-6)
  zero = jnp.zeros(4)
  assert boxes.generalized_iou(zero, zero) == 0
  assert np.isfinite(jax.grad(boxes.generalized_iou)(zero, zero)).all()
  apart = jax.grad(boxes.generalized_iou)(a, jnp.asarray([0.7, 0.7, 0.9, 0.9]))
  assert (apart[2:] > 0).all()  # it grows towards a box that it does not meet


def test_centres_and_corners():
  given = some_boxes(7)
  np.testing.assert_allclose(boxes.of_centres(boxes.to_centres(given)), given, atol=1e-6)
  np.testing.assert_allclose(
    boxes.to_centres(jnp.asarray([0.2, 0.1, 0.6, 0.9])), [0.4, 0.5, 0.4, 0.8], atol=1e-6
  )


@pytest.mark.parametrize("rows,columns", [(1, 1), (2, 5), (4, 5), (5, 5), (3, 7)])
def test_assignments_are_those_of_scipy(rows, columns):
  rng = np.random.default_rng(rows)
  cost = rng.normal(size=(50, rows, columns)).astype(np.float32)
  real = rng.random((50, rows)) < 0.7
  found = np.asarray(jax.jit(boxes.assignment)(cost, real))
  for one, there, chosen in zip(cost, real, found):
    assert len({*chosen}) == rows
    _, wanted = linear_sum_assignment(one[there])
    np.testing.assert_array_equal(chosen[there], wanted)


@pytest.mark.parametrize("shape", [(3, 2), (8, 9)])
def test_assignments_that_are_not_compared(shape):
  with pytest.raises(ValueError, match=rf"{shape[0]} regions cannot be assigned to {shape[1]}"):
    boxes.assignment(jnp.zeros(shape), jnp.ones(shape[:1], bool))


def test_the_waves_of_a_corner():
  """A quarter of a period of the slowest wave for half an image; places in order of x and y."""
  waves = boxes.corner_waves(jnp.asarray([[0.5, 0.0, 0.5, 0.5], [0.5, 0.0, 0.5, 0.25]]), 24)
  assert waves.shape == (2, 2, 24)
  x_sin, x_cos, y_sin, y_cos = waves[0, 0].reshape(4, 6)
  assert x_sin[0] == pytest.approx(1) and x_cos[0] == pytest.approx(0, abs=1e-6)
  assert not y_sin.any() and (y_cos == 1).all()
  assert x_cos[-1] == pytest.approx(math.cos(2 * math.pi * 16 * 0.5), abs=1e-4)
  np.testing.assert_array_equal(waves[0, 0], waves[1, 0])
  assert np.abs(waves[0, 1] - waves[1, 1]).max() > 0.1
  with pytest.raises(ValueError, match="the width of the image tower, 6, which 4 does not divide"):
    boxes.corner_waves(jnp.zeros(4), 6)


@pytest.mark.slow
def test_the_prompter_is_a_block_over_each_prompt_and_the_patches():
  """Each of three prompts alone with the patches through a block of the towers."""
  prompts, patches = normal(2, 3, 2, WIDTH), normal(2, 5, WIDTH, seed=1)
  module = prompter.PromptBlock(jnp.float32)
  params = module.init(jax.random.key(0), prompts, patches)
  found = module.apply(params, prompts, patches)
  whole, own = Block(1, 4 * WIDTH, "gelu"), dict(params["params"])
  own["attn"] = own.pop("attention")
  for m in range(3):
    given = jnp.concatenate([prompts[:, m], patches], 1)
    wanted, _ = whole.apply({"params": own}, given)
    np.testing.assert_allclose(found[:, m], wanted[:, :2], atol=1e-5)


@pytest.mark.slow
def test_a_region_does_not_depend_on_the_others():
  patches, given = normal(2, 9, WIDTH), some_boxes(2, 3)
  params = prompter.init(jax.random.key(0), patches, EMBED, grounds=False)
  assert sorted(params) == ["block", "region"]
  three = prompter.regions(params, patches, given)
  padded = given.at[:, 1:].set(0)
  assert three.shape == (2, 3, EMBED)
  np.testing.assert_allclose(
    prompter.regions(params, patches, padded)[:, 0], three[:, 0], atol=1e-6
  )
  np.testing.assert_allclose(
    prompter.regions(params, patches, given[:, :1]), three[:, :1], atol=1e-6
  )
  assert np.abs(three[:, 0] - three[:, 1]).max() > 1e-2


def filtered(regions, phrases, mask, ids, scale, most):
  """The definition, region by region."""
  z, text = np.asarray(regions)[mask], np.asarray(phrases)[mask]
  ids, logits, cosines = np.asarray(ids)[mask], scale * z @ text.T, text @ text.T
  negative = (ids[:, None] != ids[None]) & (cosines <= most)
  values = []
  for of in (logits, logits.T):
    rows = [np.append(x[n], x[i]) - x[i] for i, (x, n) in enumerate(zip(of, negative))]
    values.append(np.mean([np.log(np.exp(row).sum()) for row in rows]))
  return values, negative


@pytest.mark.slow
def test_similar_phrases_are_no_negatives():
  rng = np.random.default_rng(0)
  regions, phrases = unit(normal(6, 3, 8)), np.asarray(normal(6, 3, 8, seed=1)).copy()
  phrases[1:3] = phrases[0] + 0.2 * rng.normal(size=(2, 3, 8))  # alike, and not equal
  phrases = unit(jnp.asarray(phrases))
  mask, ids = rng.random((6, 3)) < 0.8, jnp.asarray(rng.integers(0, 9, (6, 3)))

  def value(phrases, most):
    return cloc_region(regions, phrases, mask, ids, jnp.asarray(7.0), text_filter=most)

  wanted, negative = filtered(regions, phrases, mask, ids, 7.0, 0.9)
  _, every = filtered(regions, phrases, mask, ids, 7.0, 1.1)
  assert 4 <= every.sum() - negative.sum() < every.sum() / 2
  np.testing.assert_allclose(value(phrases, 0.9), wanted, rtol=1e-5)
  np.testing.assert_allclose(value(phrases, 1.1), value(phrases, None), rtol=1e-6)
  # No gradient goes through the filter: it is that of the loss with these negatives fixed.
  step, grad = 1e-3, jax.grad(lambda z: sum(value(z, 0.9)))(phrases)
  along = normal(6, 3, 8, seed=2) * mask[..., None]
  up, down = (float(sum(value(phrases + s * along, 0.9))) for s in (step, -step))
  assert float((grad * along).sum()) == pytest.approx((up - down) / (2 * step), rel=1e-2)


def read(count=2, images=4, seed=0):
  """Patches with a colour for each region's inside, and phrases whose ids name the colours.

  Boxes lie on the borders of patches. Phrases are embedded by a fixed table.
  """
  rng = np.random.default_rng(seed)
  halves = np.array([[0, 0, 0.5, 1], [0.5, 0, 1, 1], [0, 0, 1, 0.5], [0, 0.5, 1, 1]], np.float32)
  colours = rng.permutation(images * count).reshape(images, count)
  patches = 0.1 * rng.normal(size=(images, SIDE, SIDE, WIDTH))
  given = np.zeros((images, count, 4), np.float32)
  for i, m in itertools.product(range(images), range(count)):
    box = halves[2 * (i % 2) + m % 2]
    left, top, right, bottom = (SIDE * box).astype(int)
    patches[i, top:bottom, left:right, colours[i, m]] += 3
    given[i, m] = box
  patches[..., -2:] += np.stack(np.meshgrid(*[np.linspace(-1, 1, SIDE)] * 2), -1)
  table = unit(normal(images * count, EMBED, seed=seed + 1))
  batch = {
    BOXES: jnp.asarray(given),
    MASK: jnp.ones((images, count), bool),
    PHRASES: jnp.asarray(colours[..., None]),
    PHRASES_MASK: jnp.ones((images, count, 1), bool),
  }
  features = {"tokens_img": jnp.asarray(patches.reshape(images, SIDE**2, WIDTH), jnp.float32)}
  texts = {"ztxt": unit(normal(images, EMBED, seed=seed + 2))}
  return Read(
    batch,
    features | texts,
    image=None,
    text=lambda ids, mask: TowerOutput(table[ids[:, 0]], table[ids]),
    project=lambda side, output: output.pooled,
    sizes=dict(embed=EMBED),
  )


def trained(loss, given, steps, rate=3e-3):
  """(metrics at the start, at the end, parameters of the head)."""
  params = loss.head.init(jax.random.key(0), given), loss.init(given.sizes)[0]
  optimizer = optax.adam(rate)

  def value(params):
    feats = dict(given.features) | loss.head.apply(params[0], params[0], given)
    total, (_, logs) = loss.apply(params[1], {}, feats, given.batch, AT)
    return total, logs

  @jax.jit
  def step(carry, _):
    params, state = carry
    (_, logs), grads = jax.value_and_grad(value, has_aux=True)(params)
    updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), logs

  (params, _), logs = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
  first, last = ({name: float(x[i]) for name, x in logs.items()} for i in (0, -1))
  return first, last, params[0]


def with_negatives(given, count=3, seed=0):
  """The same with wrong phrases of each region: other colours; the last region has none."""
  rng = np.random.default_rng(seed)
  right = np.asarray(given.batch[PHRASES])[..., 0]
  images, regions = right.shape
  wrong = (right[..., None] + rng.integers(1, right.size, (images, regions, count))) % right.size
  counts = rng.integers(1, count + 1, (images, regions))
  counts[-1, -1] = 0
  batch = {NEGATIVES: jnp.asarray(wrong[..., None], jnp.int32), NEGATIVES_COUNT: counts}
  mask = {NEGATIVES_MASK: jnp.ones((images, regions, count, 1), bool)}
  return given._replace(batch={**given.batch, **mask, **jax.tree.map(jnp.asarray, batch)})


@pytest.mark.slow
def test_a_region_prefers_its_phrase_to_wrong_ones_of_its_own():
  """FG-CLIP's hard negatives against the definition; the contrast of regions is as it was."""
  given = with_negatives(read())
  make = losses.HEADS["region_phrase"]
  loss, plain = make(pooling="prompter", own_negatives=0.5), make(pooling="prompter")
  params = loss.head.init(jax.random.key(0), given)
  scalars, _ = loss.init({})
  scalars["negatives"]["t"] = jnp.asarray(math.log(9.0))
  feats = loss.head.apply(params, params, given)
  total, (_, logs) = loss.apply(scalars, {}, feats, given.batch, AT)
  contrast, _ = plain.apply(scalars, {}, feats, given.batch, AT)

  table = np.asarray(unit(normal(8, EMBED, seed=1)))  # of `read`
  regions = np.array(prompter.regions(params, given.features["tokens_img"], given.batch[BOXES]))
  regions /= np.linalg.norm(regions, axis=-1, keepdims=True)
  values = []
  for i, m in itertools.product(range(4), range(2)):
    count = int(given.batch[NEGATIVES_COUNT][i, m])
    wrong = np.asarray(given.batch[NEGATIVES])[i, m, :count, 0]
    right = int(given.batch[PHRASES][i, m, 0])
    odds = np.exp(9.0 * table[[right, *wrong]] @ regions[i, m])
    values += [-np.log(odds[0] / odds.sum())] if count else []
  assert len(values) == 7 and np.std(values) > 0.1
  assert float(logs["own_negatives"]) == pytest.approx(np.mean(values), rel=1e-5)
  assert float(total) == pytest.approx(float(contrast) + 0.5 * np.mean(values), rel=1e-5)
  assert "own_negatives" not in plain.apply(scalars, {}, feats, given.batch, AT)[1][1]
  high = {"t": jnp.asarray(9.0), "negatives": {"t": jnp.asarray(9.0)}}
  for scale in jax.tree.leaves(loss.constrain(high, high)):
    assert float(scale) == pytest.approx(math.log(100))


def test_wrong_phrases_that_are_absent_have_no_gradient():
  differences, there = normal(2, 3, 4), np.random.default_rng(0).random((2, 3, 4)) < 0.5
  there[0, 0] = False
  value, grad = jax.value_and_grad(own_phrase)(differences, jnp.asarray(there), jnp.asarray(3.0))
  assert np.isfinite(value) and value > 0
  np.testing.assert_array_equal(np.asarray(grad) > 0, there)
  none = own_phrase(differences, jnp.zeros((2, 3, 4), bool), jnp.asarray(3.0))
  assert none == 0


@pytest.mark.slow
def test_wrong_phrases_are_learned_apart():
  given = with_negatives(read())
  loss = losses.HEADS["region_phrase"](pooling="prompter", own_negatives=1.0)
  first, last, _ = trained(loss, given, 100)
  assert first["own_negatives"] > 0.5 and last["own_negatives"] < 0.1


def test_a_prompter_learns_regions_and_boxes():
  given = read()
  loss = losses.HEADS["region_phrase"](pooling="prompter", grounding=1.0, text_filter=0.9)
  first, last, _ = trained(loss, given, 150)
  both = (last["region_to_phrase"] + last["phrase_to_region"]) / 2
  assert first["region_to_phrase"] > 1.0 and both < 0.05
  assert first["grounding"] > 0.1 and last["grounding"] < 0.01
  assert last["loss"] == pytest.approx(both + last["grounding"], rel=1e-5)


@pytest.mark.slow
def test_queries_learn_regions_and_boxes():
  given = read()
  loss = losses.HEADS["grain"](queries=3, depth=1, width=32, heads=2)
  first, last, params = trained(loss, given, 200)
  assert first["l1"] > 0.5 and last["l1"] < 0.1
  assert first["giou"] > 0.5 and last["giou"] < 0.15
  assert first["region_to_phrase"] > 1.0 and last["region_to_phrase"] < 0.1
  assert first["image"] > 1.0 and last["image"] < 0.1
  terms = ("l1", "giou", "region_to_phrase", "image")
  assert last["loss"] == pytest.approx(sum(last[name] for name in terms), rel=1e-5)
  assert params["queries"].shape == (4, 32)  # one more for the image


@pytest.mark.slow
def test_terms_of_weight_zero_are_not_computed():
  given = read()._replace(text=None, project=None)  # phrases are not embedded
  loss = losses.HEADS["grain"](queries=3, depth=1, width=32, heads=2, w_region=0.0, w_image=0.0)
  first, last, _ = trained(loss, given, 2)
  assert sorted(first) == ["giou", "l1", "logit_scale", "loss"] and not loss.pair
  assert last["loss"] < first["loss"] == pytest.approx(first["l1"] + first["giou"], rel=1e-6)


@pytest.mark.slow
def test_the_order_of_regions_does_not_matter():
  """Nor do regions that are not there, whatever their boxes are."""
  given = read()
  loss = losses.HEADS["grain"](queries=3, depth=1, width=32, heads=2)
  params, scalars = loss.head.init(jax.random.key(0), given), loss.init({})[0]

  @jax.jit
  def value(batch):
    one = given._replace(batch=batch)
    feats = dict(given.features) | loss.head.apply(params, params, one)
    return loss.apply(scalars, {}, feats, batch, AT)[0]

  turned = {name: x[:, ::-1] for name, x in given.batch.items()}
  assert value(turned) == pytest.approx(float(value(given.batch)), rel=1e-5)
  absent = {
    name: jnp.concatenate([x, jnp.zeros_like(x[:, :1])], 1) for name, x in given.batch.items()
  }
  other = absent | {BOXES: absent[BOXES].at[:, 2].set(jnp.asarray([0.1, 0.1, 0.3, 0.3]))}
  for batch in (absent, other):
    assert value(batch) == pytest.approx(float(value(given.batch)), rel=1e-5)
  with pytest.raises(ValueError, match=r"grain.queries=1: an image has .*count=2 regions"):
    small = losses.HEADS["grain"](queries=1, depth=1, width=32, heads=2)
    small.head.apply(small.head.init(jax.random.key(0), given), {}, given)


@pytest.mark.slow
def test_regions_are_matched_by_distance_and_overlap():
  found, given = jax.nn.sigmoid(normal(6, 5, 4)), some_boxes(6, 3)
  chosen = np.asarray(matched(found, given, jnp.ones((6, 3), bool)))
  for i in range(6):
    cost = [
      [
        COSTS["l1"] * np.abs(q - boxes.to_centres(box)).sum()
        - COSTS["giou"] * boxes.generalized_iou(boxes.of_centres(q), box)
        for q in found[i]
      ]
      for box in given[i]
    ]
    np.testing.assert_array_equal(chosen[i], linear_sum_assignment(np.asarray(cost))[1])


@pytest.mark.slow
def test_boxes_of_queries_lie_in_the_image():
  params = losses.HEADS["grain"](depth=1, width=32).head.init(jax.random.key(0), read())
  found = boxes_of(params, 10 * normal(2, 5, 32))
  assert found.shape == (2, 5, 4) and (found >= 0).all() and (found <= 1).all()


def test_the_share_of_images_with_regions_is_a_factor():
  rng = np.random.default_rng(0)
  feats = {name: unit(normal(8, 2, 4, seed=i)) for i, name in enumerate(("regions", "phrases"))}
  feats |= {"ids": jnp.arange(16).reshape(8, 2), "error": jnp.asarray(rng.random(8), jnp.float32)}
  mask = jnp.asarray([[True, False]] * 2 + [[True, True]] * 4 + [[False, False]] * 2)
  make = losses.HEADS["region_phrase"]
  options = dict(pooling="prompter", grounding=0.5)
  values = [
    make(**options, by_share=share).apply({"t": jnp.asarray(1.0)}, {}, feats, {MASK: mask}, AT)
    for share in (False, True)
  ]
  (whole, (_, logs)), (part, (_, more)) = values
  assert part == pytest.approx(0.75 * float(whole), rel=1e-6)
  assert more["images_with_regions"] == 0.75
  assert logs["grounding"] == pytest.approx(float(feats["error"].sum()) / 10, rel=1e-6)
  contrast = (logs["region_to_phrase"] + logs["phrase_to_region"]) / 2
  assert whole == pytest.approx(float(contrast + 0.5 * logs["grounding"]), rel=1e-6)


@pytest.mark.parametrize(
  "options,message",
  [
    (dict(pooling="prompt"), r"region_phrase.pooling: unknown 'prompt'; known: \['boxes', 'prom"),
    (dict(grounding=1.0), r"grounding=1.0 trains the Prompter; set .*pooling='prompter'"),
    (dict(pooling="prompter", grounding=-1.0), "grounding=-1.0 must be at least 0"),
    (dict(own_negatives=-1.0), "own_negatives=-1.0 must be at least 0"),
    (dict(text_filter=1.5), "text_filter=1.5 must be between -1 and 1"),
  ],
)
def test_mistakes_in_options_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    losses.HEADS["region_phrase"](**options)
