"""Running averages of the parameters, and the warm-up of their decay."""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.shipped import load

from bigalign.config import resolve_config
from bigalign.program import init_state, make_program
from bigalign.step import data_position, ema_decay, train_step


def decays(steps, **options):
  program = types.SimpleNamespace(**{"ema": 0.999, "ema_warmup": True, **options})
  return np.asarray([float(ema_decay(program, jnp.asarray(n))) for n in range(steps)])


def test_a_short_run_does_not_average_its_random_first_parameters():
  warm = decays(150)
  np.testing.assert_allclose(warm, (1 + np.arange(150)) / (10 + np.arange(150)), rtol=1e-6)
  np.testing.assert_allclose(np.prod(decays(150, ema_warmup=False)), 0.8606, rtol=1e-3)
  assert np.prod(warm) < 1e-12
  np.testing.assert_allclose(decays(20, ema=0.5)[[0, 7, 8, 19]], [0.1, 8 / 17, 0.5, 0.5], rtol=1e-6)


@pytest.mark.slow
def test_an_update_averages_with_the_decay_of_its_step():
  c = load("tiny").to_dict() | dict(batch_size=8, ema=0.9, evals={})
  stored = dict(name="features", width=8)
  c["model"] = dict(image=stored, text=stored, embed_dim=4)
  program = make_program(resolve_config(c), dataset_size=100)
  state = init_state(program, jax.random.key(0))
  rng = np.random.default_rng(0)
  batch = {
    name: jnp.asarray(
      rng.integers(0, 99, shape) if name in ("image", "text") else np.ones(shape), t
    )
    for name, (shape, t) in program.spec.items()
  }
  step = jax.jit(functools.partial(train_step, program=program))
  for decay in (0.1, 2 / 11):
    after, _, _ = step(state, batch, data_position(0, 1))
    for path, x in after.ema.items():
      expected = decay * state.ema[path] + (1 - decay) * after.trainable[path]
      np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-7, err_msg=path)
    state = after
