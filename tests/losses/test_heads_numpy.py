"""Heads without stored values (masked copies, SPARC, words, locality, fused captions), in NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_oracles import AT
from helpers.small_runs import config
from scipy.special import erf

from bigalign import losses, reading, tree
from bigalign.config import resolve_config
from bigalign.losses.heads.base import Read
from bigalign.program import init_params, make_program
from bigalign.towers.base import TowerOutput


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def read_of(**others):
  """Tokens of four images and texts of different widths, of which the texts have padding."""
  features = {"tokens_img": normal(4, 9, 6), "tokens_txt": normal(4, 5, 8, seed=1)}
  mask = np.arange(5) < np.array([[2], [5], [3], [4]])
  return Read({"text_mask": mask}, features, None, None, None, {}, **others)


@pytest.mark.slow
def test_masked_copies_of_some_images_approach_the_whole_images():
  """1 - cosine of hidden patches of every second image; the whole images get no gradient."""
  c = config({}, **{"ema": 0.0, "model.image.depth": 1, "model.text.depth": 1})
  with c.unlocked():
    c.loss = dict(siglip={}, mask_regularization=dict(every=2))
  program = make_program(resolve_config(c))
  params = init_params(program, jax.random.key(0))
  rng = np.random.default_rng(0)
  batch = {"image": jnp.asarray(rng.integers(0, 255, (4, 32, 32, 3)), jnp.uint8)}
  batch |= {"text": jnp.ones((4, 48), jnp.int32), "text_mask": jnp.ones((4, 48), bool)}
  drawn = reading.draws(program.loss, jax.random.key(1), batch, program.sizes)
  places = np.asarray(drawn["mask_regularization/hidden"])
  assert places.shape == (4, 16) and (places.sum(1) == 6).all()  # 0.4 of 16
  variables = {"params": tree.unflatten(tree.subtree(params, "model/"))}
  tokens = functools.partial(program.model.apply, method="image_output")

  def found(params):
    model = {"params": tree.unflatten(tree.subtree(params, "model/"))}
    feats = program.model.apply(model, *batch.values())
    given = program.model, params, params, feats, batch | drawn, program.sizes
    return tree.subtree(
      reading.apply(program.loss, *given, {"mask_regularization": {}}), "mask_regularization/"
    )

  def copies(params, whole):
    model = {"params": tree.unflatten(tree.subtree(params, "model/"))}
    hidden = jnp.asarray(places[::2]), params["heads/mask_regularization/vector"]
    own = tokens(model, batch["image"][::2], hidden).tokens
    lengths = jnp.linalg.norm(own, axis=-1) * jnp.linalg.norm(whole, axis=-1)
    return jnp.where(places[::2], 1 - (own * whole).sum(-1) / lengths, 0).sum(1)

  def graded(function, *args):
    """What a function of the parameters returns, and the gradients of its sum."""

    def value(params):
      each = function(params, *args)
      return (each["sum"] if isinstance(each, dict) else each).sum(), each

    return jax.jit(jax.grad(value, has_aux=True))(params)[::-1]

  wanted, of_copies = graded(copies, tokens(variables, batch["image"][::2]).tokens)
  got, grads = graded(found)
  np.testing.assert_allclose(got["sum"], wanted, rtol=1e-5)
  np.testing.assert_array_equal(got["count"], [6, 6])
  largest = max(np.abs(x).max() for x in of_copies.values())
  assert largest > 1e-2 and (np.asarray(wanted) > 0.1).all()
  for path, x in of_copies.items():
    np.testing.assert_allclose(grads[path], x, atol=1e-5 * largest, err_msg=path)


@pytest.mark.slow
def test_sparc_compares_patches_and_words_behind_their_adapters():
  loss = losses.HEADS["sparc_adapted"](width=7)
  given = read_of()
  params = loss.head.init(jax.random.key(0), given)
  found = loss.head.apply(params, params, given)
  layer = {k: (np.asarray(x["kernel"]), np.asarray(x["bias"])) for k, x in params.items()}
  patches, words = (given.features[f"tokens_{side}"] for side in ("img", "txt"))
  mask = given.batch["text_mask"]
  image = patches.mean(1) @ layer["global"][0] + layer["global"][1]
  image = image * 0.5 * (1 + erf(image / np.sqrt(2)))
  text = (words * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
  wanted = {"zimg": unit(image @ layer["img"][0] + layer["img"][1])}
  wanted["ztxt"] = unit(text @ layer["txt"][0] + layer["txt"][1])
  wanted["tokens_img"] = patches @ layer["img"][0] + layer["img"][1]
  wanted["tokens_txt"] = words @ layer["txt"][0] + layer["txt"][1]
  for name, x in wanted.items():
    np.testing.assert_allclose(found[name], x, atol=1e-5, err_msg=name)
  np.testing.assert_array_equal(found["mask_txt"], mask)
  plain = losses.LOSSES["sparc"]()
  scalars = plain.init({})[0]
  values = [x.apply(scalars, {}, found, {}, AT)[0] for x in (loss, plain)]
  assert values[0] == values[1] > 0.1


@pytest.mark.slow
def test_bags_of_words_hold_the_largest_score_of_each_word():
  loss = losses.HEADS["lexical"](penalty_updates=0, penalty=0.5)
  table = normal(11, 8, seed=2)
  given = read_of(words=lambda: jnp.asarray(table))
  params = loss.head.init(jax.random.key(0), given)
  params["words"]["embedding"] = jnp.asarray(normal(11, 8, seed=3))  # trained apart from the table
  found = loss.head.apply(params, params, given)
  patches, words = (given.features[f"tokens_{side}"] for side in ("img", "txt"))
  adapted = patches @ np.asarray(params["adapter"]["kernel"])
  scores = {"img": adapted @ np.asarray(params["words"]["embedding"]).T, "txt": words @ table.T}
  scores["txt"] = np.where(given.batch["text_mask"][..., None], scores["txt"], -np.inf)
  bags = {k: np.log1p(np.maximum(x.max(1), 0)) for k, x in scores.items()}
  for name, x in bags.items():
    np.testing.assert_allclose(found[name], x, rtol=1e-4, atol=1e-5)
  scalars, state = loss.init({})
  total, (_, logs) = loss.apply(scalars, state, found, {}, AT)
  cosines = np.exp(scalars["t"]) * unit(bags["img"]) @ unit(bags["txt"]).T
  own = np.diag(cosines)
  contrast = np.mean([np.log(np.exp(x - own[:, None]).sum(1)) for x in (cosines, cosines.T)])
  used = sum((x.mean(0) ** 2).sum() for x in bags.values())
  np.testing.assert_allclose(logs["overuse"], used, rtol=1e-4)
  np.testing.assert_allclose(total, contrast + 0.5 * used, rtol=1e-4)


def layer_norm(x, layer):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * layer["scale"] + layer["bias"]


def linear(x, layer):
  return x @ layer["kernel"].reshape(x.shape[-1], -1) + layer["bias"].reshape(-1)


def transformer_block(x, layers, heads, seen=True):
  """A pre-norm block: attention of places to those that they see, [N, N], and an MLP with GELU."""
  y = layer_norm(x, layers["ln1"])
  q, k, v = (
    linear(y, layers["attn"][name]).reshape(*x.shape[:2], heads, -1)
    for name in ("query", "key", "value")
  )
  logits = np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(q.shape[-1])
  weights = np.where(seen, np.exp(logits), 0)
  weights /= weights.sum(-1, keepdims=True)
  mixed = np.einsum("bhij,bjhd->bihd", weights, v).reshape(x.shape)
  out = layers["attn"]["out"]
  x = x + mixed @ out["kernel"].reshape(x.shape[-1], -1) + out["bias"]
  y = linear(layer_norm(x, layers["ln2"]), layers["mlp"]["fc1"])
  y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
  return x + linear(y, layers["mlp"]["fc2"])


def spread(params, seed=7):
  """The parameters with random values in place of ones and zeros, as float64 and as they are."""
  flat = tree.flatten(params)
  rng = np.random.default_rng(seed)
  flat = {k: np.asarray(x) + 0.2 * rng.normal(size=x.shape) for k, x in sorted(flat.items())}
  wide = tree.unflatten(flat)
  return wide, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), wide)


def test_locality_is_learned_from_a_teacher_that_sees_a_part_of_the_image():
  """The hidden patches of each image, the others, and none: tokens of all three, in a decoder."""
  loss = losses.HEADS["token_distill"](hidden_from="teacher", kind="mse", decoder=1, heads=2)
  rng = np.random.default_rng(0)
  images = rng.integers(0, 255, (2, 12, 12, 3)).astype(np.uint8)  # 9 patches of 4 x 4
  own, seen_as = normal(2, 9, 6), normal(48, 6, seed=1) / 100

  def teacher(images, hidden, vector=0):
    """Each token is that of its patch and the mean of all; hidden patches are 0 (NumPy or JAX)."""
    patches = images.reshape(-1, 3, 4, 3, 4, 3).swapaxes(2, 3).reshape(-1, 9, 48) @ seen_as
    patches = patches * ~hidden[..., None] + vector * hidden[..., None]
    return patches + patches.mean(1, keepdims=True)

  def tower(given, *, averaged, hidden):
    places, vector = hidden
    assert averaged
    return TowerOutput(None, teacher(given, places, vector[None, None]))

  hidden = rng.random((2, 9)) < 0.4
  batch = {"image": images, "hidden": hidden}
  read = Read(batch, {"tokens_img": jnp.asarray(own)}, None, None, None, {"patch": 4})
  whole = read._replace(image=lambda given, **_: TowerOutput(None, jnp.zeros((2, 9, 6))))
  layers, params = spread(jax.jit(lambda key: loss.head.init(key, whole))(jax.random.key(0)))
  read = read._replace(image=tower)
  found = jax.jit(lambda params: loss.head.apply(params, params, read))(params)

  wanted = np.zeros(2)
  for places in (hidden, ~hidden, np.zeros_like(hidden)):
    x = own * ~places[..., None] + layers["positions"]
    predicted = linear(transformer_block(x, layers["block_0"], heads=2), layers["out"])
    wanted += ((predicted - teacher(images, places)) ** 2).mean(-1).sum(1)
  np.testing.assert_allclose(found["sum"], wanted, rtol=1e-4)
  np.testing.assert_array_equal(found["count"], [27, 27])


@pytest.mark.slow
def test_a_fused_decoder_predicts_each_token_from_the_prefix_and_the_tokens_before():
  options = dict(inputs="tokens", keep=0.5, depth=1, heads=2, scan=False)
  options |= dict(reads_text=True, second=True)
  loss = losses.HEADS["caption_fused"](**options, label_smoothing=0.1)
  rng = np.random.default_rng(0)
  ids, mask = rng.integers(0, 11, (2, 5)), np.arange(5) < np.array([[3], [5]])
  image, text = normal(2, 9, 6), normal(2, 5, 8, seed=1)
  kept = np.array([[0, 3, 4, 8], [1, 2, 5, 7]])
  batch = {"text_second": ids.astype(np.int32), "text_second_mask": mask, "kept": kept}
  batch["text"] = batch["text_second"][::-1]  # of which the decoder reads the states alone
  given = {"tokens_img": jnp.asarray(image), "tokens_txt": jnp.asarray(text)}
  read = Read(
    jax.tree.map(jnp.asarray, batch), given, None, None, None, {"patch": 4, "vocabulary": 11}
  )
  layers, params = spread(jax.jit(lambda key: loss.head.init(key, read))(jax.random.key(0)))
  found = jax.jit(lambda params: loss.head.apply(params, params, read))(params)

  decoder = layers["decoder"]
  before = np.concatenate([np.zeros((2, 1), int), ids[:, :-1]], 1)
  places = decoder["queries"] + decoder["embedding"][before]
  of_image = linear(np.take_along_axis(image, kept[..., None], 1), decoder["image"])
  x = np.concatenate([of_image, linear(text, decoder["text"]), places], 1)  # 4, 5 and 5 places
  seen = np.tril(np.ones((14, 14), bool))
  seen[:9, :9] = True
  stack = decoder["decoder"]
  x = layer_norm(transformer_block(x, stack["block_0"], heads=2, seen=seen), stack["ln"])[:, 9:]
  logits = x @ layers["logits"]["kernel"]
  logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  own = np.take_along_axis(logs, ids[..., None], -1)[..., 0]
  wanted = -0.9 * own - 0.1 * logs.mean(-1)
  np.testing.assert_allclose(found["sum"], (wanted * mask).sum(1), rtol=1e-4)
  np.testing.assert_array_equal(found["count"], [3, 5])
  assert found["correct"] == ((logits.argmax(-1) == ids) & mask).sum()


@pytest.mark.slow
def test_words_of_a_text_are_classes_of_the_image_that_weigh_more_if_they_are_rare():
  """Two steps; counts of the texts of both, each word of a text once; padding is no word."""
  loss = losses.HEADS["superclass"]()
  rng = np.random.default_rng(0)
  params, (scalars, state) = None, loss.init({"vocabulary": 11})
  seen = np.zeros(11)
  for step in range(2):
    ids = rng.integers(1, 9, (4, 6)).astype(np.int32)
    ids[:, 1] = 10  # in each text
    mask = np.arange(6) < np.array([[2], [6], [3], [5]])
    ids[3] = 10  # a text without another word
    pooled = normal(4, 7, seed=step)
    batch = {"text": jnp.asarray(ids), "text_mask": jnp.asarray(mask)}
    read = Read(batch, {"pooled_img": jnp.asarray(pooled)}, None, None, None, {"vocabulary": 11})
    params = params or loss.head.init(jax.random.key(0), read)
    params["words"]["bias"] = jnp.asarray(normal(11, seed=3))
    feats = loss.head.apply(params, {}, read)
    value, (state, logs) = loss.apply(scalars, state, feats, batch, AT)

    bags = np.stack([np.isin(np.arange(11), row[keep]) for row, keep in zip(ids, mask)])
    seen += bags.sum(0)
    samples = 4 * (step + 1)
    weights = bags * np.log((samples + 1) / (seen + 1))
    logits = pooled @ np.asarray(params["words"]["kernel"]) + np.asarray(params["words"]["bias"])
    nll = np.log(np.exp(logits).sum(1, keepdims=True)) - logits
    each = (weights * nll)[:3].sum(1) / weights[:3].sum(1)
    np.testing.assert_allclose(value, each.mean(), rtol=1e-5)
    np.testing.assert_allclose(logs["words"], bags.sum(1).mean())
  assert weights[3].sum() == 0 and (seen[10], state["samples"]) == (8, 8)
