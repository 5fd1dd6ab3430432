"""Losses with layers of their own: equal on every mesh, in microbatches and with recomputation."""

from __future__ import annotations

import functools
import re

import jax
import numpy as np
import pytest
from helpers.one_step import update
from helpers.shipped import load

from bigalign import losses, sharding
from bigalign.config import resolve_config
from bigalign.program import layout, make_program
from bigalign.step import data_position, jitted

BATCH = 16
# The options of each head, and what else its config needs; after a colon, another form of the head.
SMALL = dict(prototypes=64, hidden=48, bottleneck=16, teacher_temp_updates=0)
VIEWS = dict(views=dict(**{"global": dict(count=2)}, local=dict(count=3, size=16)))
REGIONS = dict(regions=dict(field="json.regions", count=2))
LOCATIONS = dict(locations=dict(field="json.regions"))
CASES = dict(
  caption=(dict(depth=1, heads=4), {}),
  caption_fused=(
    dict(depth=1, heads=4, keep=0.5, inputs="tokens", reads_text=True, second=True),
    dict(data=dict(second_captions=("syn",))),
  ),
  coca=(
    dict(depth=1, heads=4),
    dict(
      model=dict(
        image=dict(name="vit", patch=8, pool="queries", queries=4, query_heads=4),
        text=dict(name="text", vocab_size=259, length=48, pool="class", causal=True),
      )
    ),
  ),
  ibot=(
    SMALL | dict(form="all"),
    dict(
      data=dict(views={"global": VIEWS["views"]["global"]}),
      twin=dict(decay=0.9, paths="heads/ibot"),
    ),
  ),
  mask_regularization=(dict(every=2), {}),
  silc=(
    SMALL | dict(pairs="all_but_same", contrast="siglip"),
    dict(data=VIEWS, twin=dict(decay=0.9)),
  ),
  fdt=(dict(codes=24, width=16, temperature=1.0), {}),
  grain=(dict(queries=3, depth=1, width=32, heads=4), dict(data=REGIONS)),
  gram=(  # without drop path, whose draws are those of a microbatch
    dict(of="projector"),
    dict(model=dict(image_projector=dict(name="blocks", depth=1, heads=2, drop_path=0.0))),
  ),
  lexical=(dict(penalty_updates=0), {}),
  region_phrase=(
    dict(pooling="prompter", text_filter=0.9, grounding=1.0, by_share=True),
    dict(data=REGIONS),
  ),
  sparc_adapted=(dict(width=24), {}),
  token_distill=(
    dict(hidden_from="teacher", kind="mse", decoder=1, heads=2),
    dict(twin=dict(decay=1.0, paths="image_tower")),
  ),
  superclass=({}, {}),
  vlap=({}, {}),
  **{
    "caption:tasks": (dict(depth=1, heads=4, tasks=True), dict(data=LOCATIONS)),
    "region_phrase:boxes": (
      dict(own_negatives=0.5),
      dict(data=dict(regions=dict(REGIONS["regions"], negatives=2))),
    ),
  },
)

# Heads that one config can hold: most of the time is spent on compiling the towers.
TOGETHER = (
  "coca",
  "caption:tasks gram region_phrase:boxes token_distill",
  "ibot silc",
  "caption caption_fused fdt grain lexical mask_regularization region_phrase sparc_adapted"
  " superclass vlap",
)
WITHOUT_LAYERS = ("gram", "region_phrase:boxes")  # they read those of the model alone


@functools.cache
def step(names, microbatches=1, remat="none", mesh=(1, 1, 1), weight=1.0, frozen=""):
  """One update with these heads."""
  heads = {_head(name): CASES[name][0] | dict(weight=weight) for name in names.split()}
  changes = functools.reduce(_merged, (CASES[name][1] for name in names.split()))
  c = load("tiny").to_dict() | dict(
    batch_size=BATCH,
    microbatches=microbatches,
    optimizer=dict(name="sgd", lr=1.0, momentum=0.0, clip_norm=None),
    loss=dict(siglip={}) | heads,
    mesh=dict(zip(sharding.AXES, mesh)),
    frozen=frozen,
    ema=0.0,
    **{k: x for k, x in changes.items() if k not in ("data", "model")},
  )
  for part in ("data", "model"):
    c[part] |= changes.get(part, {})
  for side in ("image", "text"):
    c["model"][side] |= dict(depth=1, width=32, heads=4, remat=remat, dtype="float32")
  return update(c, _random)


def _head(name):
  """The head of a case."""
  return name.partition(":")[0]


def _merged(one, other):
  """The changes of two heads together; an error where they set an option differently."""
  both = {k: _merged(one[k], other[k]) for k in one.keys() & other.keys() if one[k] != other[k]}
  return one | other | both


def _random(rng, field, shape, dtype):
  if field in ("text_mask", "text_second_mask", "region_phrases_mask", "region_negatives_mask"):
    return np.arange(shape[-1]) < rng.integers(3, shape[-1], (*shape[:-1], 1))
  if np.issubdtype(dtype, np.floating):
    return rng.uniform(size=shape).astype(dtype)
  kinds = {"image": 255, "text": 200, "task_text": 200, "source": 1, "repaired": 1, "rejects": 1}
  kinds |= dict(region_negatives_count=3, region_negatives=200)
  high = next((x for k, x in kinds.items() if field.startswith(k)), 255 if "view" in field else 2)
  return rng.integers(0, high, shape).astype(dtype)


def same(found, wanted):
  """Gradients within 1e-5 of their largest element, or 1e-6 of the largest of all."""
  scale = max(np.abs(x).max() for x in wanted.values())
  assert found.keys() == wanted.keys()
  for path, x in wanted.items():
    atol = max(1e-5 * np.abs(x).max(), 1e-6 * scale)
    np.testing.assert_allclose(found[path], x, rtol=0, atol=atol, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("names", TOGETHER)
def test_equal_over_the_mesh_in_microbatches_with_recomputation(names):
  gradients, averages, scalars, _ = step(names)
  for name in names.split():
    layers = [x for path, x in gradients.items() if path.startswith(f"heads/{_head(name)}/")]
    assert any(np.abs(x).max() > 0 for x in layers) or name in WITHOUT_LAYERS, name
    assert np.isfinite(scalars[f"{_head(name)}/loss"])
  again = step(names, microbatches=2, remat="full", mesh=(2, 2, 2))
  same(again[0], gradients)
  if averages:
    same(again[1], averages)
  if "token_distill" in names:  # a twin with a decay of 1 stays as it was
    assert averages and not any(x.any() for x in averages.values())
  for key, x in scalars.items():
    np.testing.assert_allclose(again[2][key], x, rtol=5e-5, atol=1e-9, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("names", TOGETHER)
def test_a_frozen_model_leaves_the_gradients_of_heads_as_they_are(names):
  whole, found = step(names)[0], step(names, frozen="^model/")[0]
  assert not any(path.startswith("model/") for path in found)
  same(found, {path: x for path, x in whole.items() if not path.startswith("model/")})


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["ibot", "caption"])
def test_layers_are_computed_in_one_of_the_two_passes(name):
  """The compiler leaves out of the first pass what is only needed in the second."""
  operations = re.findall(r'op_name="([^"]*)"', step(name, microbatches=2).compiled.as_text())
  of_heads = [x for x in operations if re.search(r"/(jvp\()?heads\b", x)]
  first = [x for x in of_heads if "first_pass" in x]
  assert len(first) < 0.02 * len(of_heads), first
  assert sum("first_pass" in x for x in operations) > 0.05 * len(operations)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("mesh,microbatches", [((8, 1, 1), 2), ((1, 8, 1), 1), ((1, 4, 2), 4)])
def test_equal_on_other_meshes(name, mesh, microbatches):
  gradients, _, scalars, _ = step(name)
  again = step(name, microbatches=microbatches, mesh=mesh)
  same(again[0], gradients)
  np.testing.assert_allclose(again[2]["loss"], scalars["loss"], rtol=2e-5)


@pytest.mark.slow
def test_a_weight_of_zero_costs_nothing():
  """Neither parameters, nor fields of the batch, nor operations of the program."""
  config = load("tiny")
  for side in ("image", "text"):
    config.model[side].depth = 1
  plain = make_program(resolve_config(config))
  zero = {_head(name): own | dict(weight=0.0) for name, (own, _) in CASES.items()}
  for heads in (*({name: own} for name, own in zero.items()), zero):
    config.loss = dict(siglip={}, **heads)
    without = make_program(resolve_config(config))
    assert without.params == plain.params and [*without.loss.terms] == ["siglip"]
    assert without.spec == plain.spec
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  texts = []
  for program in (plain, without):
    state, shardings = layout(program, mesh)
    batch = {name: jax.ShapeDtypeStruct(*x) for name, x in program.spec.items()}
    with jax.set_mesh(mesh):
      lowered = jitted(program, shardings, mesh).lower(state, batch, data_position(0, 1))
    texts.append(lowered.as_text())
  assert texts[0] == texts[1]


def test_every_head_has_a_case_here():
  assert {*CASES} == {name for names in TOGETHER for name in names.split()}
  assert {_head(name) for name in CASES} == {*losses.HEADS}


@pytest.mark.parametrize("name", sorted(losses.HEADS))
def test_docstrings_name_their_source(name):
  text = losses.HEADS[name].__doc__
  assert "https://" in text or "not published" in text
  assert "Args:" in text


@pytest.mark.parametrize(
  "loss,changes,message",
  [
    (dict(ibot={}), {}, r"ibot reads the field 'view/global'.* Set config\.data\.views"),
    (dict(silc={}), {}, r"silc reads the field 'view/global'.* Set config\.data\.views"),
    (dict(caption=dict(tasks=True)), {}, r"'task'.* Set config\.data\.locations"),
    (dict(caption_fused=dict(second=True)), {}, r"Set config\.data\.second_captions"),
    (
      dict(caption_fused=dict(reads_text=True)),
      {},
      r"shows the decoder .*caption_fused\.second=True",
    ),
    (dict(coca={}), {}, r"coca predicts the next token .*config\.model\.text=dict\(causal=True"),
    (dict(ibot=dict(view="")), dict(twin=dict(decay=0.9, paths="heads/silc")), "matches no param"),
  ],
)
def test_what_a_head_lacks_is_named_before_it_has_parameters(loss, changes, message):
  c = load("tiny").to_dict() | changes | dict(loss=dict(siglip={}) | loss)
  with pytest.raises(ValueError, match=message):
    make_program(resolve_config(c))
