"""The log describes the loss of a run, and traces the towers for that only if it has to."""

from __future__ import annotations

import functools

import jax
import pytest
from helpers import small_runs

from bigalign import losses, sharding, step
from bigalign.config import resolve_config
from bigalign.options import plain
from bigalign.program import layout, make_program


@pytest.mark.parametrize("more", [{}, dict(sparc=dict(weight=1.0))])
def test_the_loss_is_described_without_tracing_towers_if_possible(more, monkeypatch):
  config = small_runs.config({"data": -1}, loss=dict(siglip=dict(weight=1.0), **more))
  program = make_program(resolve_config(plain(config)), dataset_size=100)
  shapes, _ = layout(program, sharding.make_mesh(), [("", ())])
  traced, features = [], step.features
  monkeypatch.setattr(step, "features", lambda *args: traced.append(1) or features(*args))
  text = step.summary(program, shapes)
  assert bool(traced) == bool(more)

  batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in program.spec.items()}
  feats = jax.eval_shape(
    functools.partial(features, program),
    shapes,
    shapes.trainable,
    step._inputs(program, batch, jax.random.key(0)),
    jax.random.key(0),
  )
  known = jax.eval_shape(functools.partial(step._for_loss, program), batch)
  assert text == losses.summary(program.loss, program.sizes, feats, known)
