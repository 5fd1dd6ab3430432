"""Heads that classify into prototypes (DINO, SILC, iBOT): the second oracles, limits, collapse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_oracles import AT, both_precisions, cases2, check2, oracles2, run2

from bigalign import losses
from bigalign.losses.heads import prototypes as classes


def same(x):
  return x


@both_precisions
@pytest.mark.parametrize("case", cases2("dino_head"))
def test_the_layers(case, precision):
  def value(inputs, scalars):
    params = {f"fc{i}": {"kernel": inputs[f"w{i}"], "bias": inputs[f"b{i}"]} for i in (1, 2, 3)} | {
      "prototypes": {"kernel": inputs["prototypes"].T}
    }
    y = classes.logits(params, classes.vectors(params, inputs["x"]))
    loss = (y * inputs["probe"]).mean()
    return loss, {"loss": loss, "y": y}

  check2(case, run2(case, precision, value), precision, require=("y",))


@both_precisions
@pytest.mark.parametrize("case", cases2("dino"))
def test_classes_of_views(case, precision):
  options = case["params"]
  number = oracles2().inputs(case, 0)["teacher"].shape[-1]
  state = {k: x.astype(precision) for k, x in classes.initial_state(number).items()}
  for step, temperature in enumerate(options["teacher_temps"]):

    def value(inputs, scalars, temperature=temperature):
      teachers = jnp.swapaxes(inputs["teacher"], 0, 1)
      students = jnp.swapaxes(inputs["student"], 0, 1)
      first = options["global_views"] if options["pairs"] == "local_only" else 0
      students = students[:, first:]
      targets = classes.assigned(teachers, inputs["more"]["center"], temperature)
      total = classes.compared(same, students, targets, options["pairs"], options["student_temp"])
      pairs = classes.pairs_of(teachers.shape[1], students.shape[1], options["pairs"])
      loss = total.sum() / (len(students) * pairs)
      sums = classes.of_teacher(teachers, targets)
      count = teachers.shape[0] * teachers.shape[1]
      after = classes.next_state(inputs["more"], sums["logits"], count, options["center_momentum"])
      return loss, {"loss": loss, "state_center": after["center"]}

    got = run2(case, precision, value, step=step, key=(temperature,), more=state)
    check2(case, got, precision, step=step, require=("state_center",))
    state = state | {"center": got["state_center"]}


@both_precisions
@pytest.mark.parametrize("case", cases2("ibot"))
def test_classes_of_patches(case, precision):
  options = case["params"]
  number = oracles2().inputs(case, 0)["teacher"].shape[-1]
  state = {k: x.astype(precision) for k, x in classes.initial_state(number).items()}
  for step, temperature in enumerate(options["teacher_temps"]):

    def value(inputs, scalars, temperature=temperature):
      mask = inputs["mask"] > 0
      found = classes.patches(
        (same, same),
        inputs["student"],
        inputs["teacher"],
        mask,
        inputs["more"]["center"],
        (options["student_temp"], temperature),
      )
      if options["form"] == "masked":
        loss = (found["masked"] / jnp.maximum(mask.sum(1), 1)).mean()
      else:
        loss = (found["masked"] + found["visible"]).sum() / mask.size
      after = classes.next_state(
        inputs["more"], found["logits"], mask.size, options["center_momentum"]
      )
      visible = found["visible"].sum() / (~mask).sum()
      return loss, {"loss": loss, "visible": visible, "state_center": after["center"]}

    got = run2(case, precision, value, step=step, key=(temperature,), more=state)
    check2(case, got, precision, step=step, require=("state_center", "visible"))
    state = state | {"center": got["state_center"]}


def views(seed=0, teachers=2, students=5, prototypes=12):
  rng = np.random.default_rng(seed)
  return tuple(
    jnp.asarray(rng.normal(size=(4, n, prototypes)), jnp.float32) for n in (teachers, students)
  )


def test_a_student_that_equals_its_teacher_has_the_entropy_of_the_classes():
  teachers, _ = views()
  targets = classes.assigned(teachers, jnp.zeros(12), 0.1)
  found = classes.compared(same, teachers[:, :1], targets[:, :1], "local_only", 0.1)
  np.testing.assert_allclose(found, classes.entropy(targets[:, 0]), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pairs", ["local_only", "all_but_same"])
def test_groups_of_views_change_neither_value_nor_gradient(pairs, monkeypatch):
  teachers, students = views()
  targets = classes.assigned(teachers, jnp.zeros(12), 0.07)

  def value(x):
    return classes.compared(same, x, targets, pairs, 0.1).sum()

  whole = jax.value_and_grad(value)(students)
  monkeypatch.setattr(classes, "AT_ONCE", 12)  # one view at a time
  for a, b in zip(jax.value_and_grad(value)(students), whole):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_collapse_is_seen():
  """One class for all images, and all classes for each image."""
  one = jnp.zeros((4, 2, 12)).at[..., 3].set(1)
  for targets, entropy, of_mean in ((one, 0, 0), (jnp.full((4, 2, 12), 1 / 12), *[np.log(12)] * 2)):
    seen = classes.watched(classes.of_teacher(targets, targets), 8)
    np.testing.assert_allclose(seen["entropy"], entropy, atol=1e-6)
    np.testing.assert_allclose(seen["entropy_of_mean"], of_mean, atol=1e-6)


@pytest.mark.parametrize("name", ["silc", "ibot"])
def test_balanced_classes_are_used_equally(name):
  """With Sinkhorn's algorithm, though the teacher prefers one class."""
  teachers, students = views(students=2)
  loss = losses.HEADS[name](center="sinkhorn", prototypes=12, teacher_temp_updates=0)
  _, state = loss.init({})
  feats = {"teacher": (0.1 * teachers).at[..., 0].add(1), "student": students}
  _, (after, metrics) = loss.apply({}, state, feats, {}, AT)
  assert metrics["entropy_of_mean"] > 0.9 * np.log(12)
  assert after["updates"] == 1


def test_the_temperature_of_the_teacher_grows_with_its_own_updates():
  state = classes.initial_state(3)
  found = [
    float(classes.teacher_temperature((0.04, 0.07), 3, state | {"updates": jnp.asarray(n)}))
    for n in (0.0, 1.0, 3.0, 9.0)
  ]
  np.testing.assert_allclose(found, [0.04, 0.05, 0.07, 0.07], rtol=1e-6)
