"""Retrieval per language, within one modality, and mAP@R: as loops over the samples find."""

from __future__ import annotations

import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score
from test_evals import (
  E,
  Tiny,
  embed_image,
  embed_image_coarsely,
  embed_text,
  embed_text_coarsely,
  make,
  make_params,
  numpy_retrieval,
  tokenise,
)

from bigalign.data.sources.base import open_source
from bigalign.evals import caption_languages, embed, retrieval, same_modality
from bigalign.suites.suite import Task, scored

MESHES = [dict(devices=jax.devices()[:1]), dict(data=2, fsdp=2, tensor=2)]
EXACT, COARSE = (embed_image, embed_text), (embed_image_coarsely, embed_text_coarsely)
FIELDS = dict(en="json.en", de="json.de.caption", ja="json.ja")


class Polyglot(Tiny):
  """Captions of three languages: 0 to 2 of each, or one language for a whole sample."""

  def __init__(self, **options):
    super().__init__(**options)
    rng = np.random.default_rng(7)
    self.texts = [
      {
        field: tuple("".join(rng.choice([*"abcdefgh"], 6)) for _ in range((i + k) % 3))
        for k, field in enumerate(FIELDS.values())
      }
      for i in range(len(self))
    ]
    self.spoken = [["en", "de", ""][i % 3] for i in range(len(self))]
    self.asked = None

  def __getitem__(self, i):
    record = super().__getitem__(i)
    texts = {field: self.texts[i].get(field, ()) for field in self.asked or ()}
    return record | (
      dict(texts=texts, captions=next(filter(None, texts.values()), ())) if texts else {}
    )

  def value(self, i, path):
    if path == "json.each":  # a language for each caption
      return [["en", "de"][k % 2] for k in range(len(self.captions[i]))]
    return self.spoken[i] if path == "json.language" else None

  def fields(self, i):
    return {"png": b"", "json": b'{"language": "en", "each": []}'}


@pytest.fixture
def source(monkeypatch):
  opened = Polyglot(silent=())

  def open_source(spec, captions=None, frames=False, images=True):
    opened.asked = captions if captions and any("." in name for name in captions) else None
    return opened

  for module in (embed, caption_languages, same_modality):
    monkeypatch.setattr(module, "open_source", open_source)
  return opened


def expected(source, towers, texts_of, languages):
  """The metrics of each language, and their means."""
  params, found, used = make_params(), {}, set()
  for language in languages:
    rows = [i for i in range(37) if i not in source.broken and texts_of(i, language)]
    used |= {*rows}
    texts = [(k, text) for k, i in enumerate(rows) for text in texts_of(i, language)]
    zimg = np.asarray(towers[0](params, source.images[rows]))
    ztxt = np.asarray(towers[1](params, *tokenise([text for _, text in texts])))
    owner = np.array([k for k, _ in texts])
    values = {k.removeprefix("val/"): x for k, x in numpy_retrieval(zimg, ztxt, owner).items()}
    values["image_to_text_mAP@R"] = np.mean(
      [at_r(zimg[k] @ ztxt.T, owner == k) for k in range(len(rows))]
    )
    values["text_to_image_mAP@R"] = values["text_to_image_R@1"]
    sizes = dict(num_samples=len(rows), num_captions=len(texts))
    found |= {f"{language}-{name}": x for name, x in (values | sizes).items()}
  for name in values:
    found[f"mean_{name}"] = np.mean([found[f"{language}-{name}"] for language in languages])
  found |= dict(num_languages=len(languages), num_samples=len(used), rejected=37 - len(used))
  return {f"val/x/{name}": value for name, value in found.items()}


def at_r(sims, positive):
  """The average precision among the first R, by a loop."""
  order = np.argsort(-sims, kind="stable")[: positive.sum()]
  hits, total = 0, 0.0
  for place, entry in enumerate(order, 1):
    hits += positive[entry]
    total += positive[entry] * hits / place
  return total / positive.sum()


@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("towers", [EXACT, COARSE], ids=["distinct", "ties"])
def test_each_language_is_measured_with_its_captions(source, axes, towers, caplog):
  caplog.set_level("INFO")
  options = dict(type="retrieval", source="s", languages=FIELDS, map_at_r=True, batch_size=10)
  found = make("x", options, towers=towers, **axes)(make_params())
  wanted = expected(source, towers, lambda i, name: source.texts[i][FIELDS[name]], FIELDS)
  assert found == pytest.approx(wanted, abs=1e-6)
  assert "lowest text_to_image_R@1 of 3 languages" in caplog.text
  assert scored(Task("x", "retrieval", None), [name[6:] for name in found]) == (
    "mean_text_to_image_R@1",
    "mean_image_to_text_R@1",
  )


@pytest.mark.slow
def test_a_column_gives_the_language_of_samples_or_of_captions(source, monkeypatch, caplog):
  options = dict(type="retrieval", source="s", map_at_r=True, batch_size=16)
  found = make("x", options | dict(language="json.language"))(make_params())

  def of_sample(i, language):
    return source.captions[i] if source.spoken[i] == language else ()

  assert found == pytest.approx(expected(source, EXACT, of_sample, ["de", "en"]), abs=1e-6)
  assert "12 of 37 samples lack a language" in caplog.text

  def of_caption(i, language):
    return [text for k, text in enumerate(source.captions[i]) if ["en", "de"][k % 2] == language]

  found = make("x", options | dict(language="json.each", languages=("en", "de")))(make_params())
  assert found == pytest.approx(expected(source, EXACT, of_caption, ["en", "de"]), abs=1e-6)
  monkeypatch.setattr(embed, "CAPTIONS_AT_ONCE", 2)  # three captions in two passes
  again = make("x", options | dict(language="json.each", languages=("en", "de")))(make_params())
  assert again == pytest.approx(found, abs=1e-6)


def test_lists_of_lines_of_xtd_and_multi30k_become_a_table(tmp_path):
  """As docs/evaluation.md joins them; captions with quotation marks and commas stay whole."""
  texts = dict(
    en=['a "red" dog', "two cats, one bed", "it's late"],
    de=["ein roter Hund", "zwei Katzen", 'es ist "spät"'],
  )
  for i in range(3):
    pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"{i}.png")
  (tmp_path / "names.txt").write_text("".join(f"{i}.png\n" for i in range(3)))
  for language, lines in texts.items():
    (tmp_path / f"{language}.txt").write_text("".join(f"{line}\n" for line in lines))
  joined = "(printf 'filepath\ten\tde\n'; paste names.txt en.txt de.txt) > xtd.tsv"
  subprocess.run(joined, shell=True, check=True, cwd=tmp_path)
  options = dict(type="retrieval", source=f"{tmp_path}/xtd.tsv", languages=dict(en="en", de="de"))
  found = make("x", options)(make_params())
  assert found["val/x/num_samples"] == 3
  for language, lines in texts.items():
    assert found[f"val/x/{language}-num_captions"] == 3
    opened = open_source(f"{tmp_path}/xtd.tsv", captions=(language,))
    assert [opened[i]["captions"] for i in range(3)] == [(line,) for line in lines]


def test_languages_that_are_not_there_are_named(source):
  def fails(message, **options):
    with pytest.raises(ValueError, match=message):
      make("x", dict(type="retrieval", source="s", **options))(make_params())

  fails(
    r"x\.languages: no sample has a caption in \['fr'\]; there are de \(25 samples\), en \(24",
    languages=FIELDS | dict(fr="json.fr"),
  )
  fails(
    r"no sample has a caption in \['fr'\]; there are none; a sample stores \['json.each',"
    r" 'json.language', 'png'\]",
    languages=dict(fr="json.fr"),
  )
  fails(
    r"caption in \['ja'\] by 'json.language'; .* de \(", language="json.language", languages=["ja"]
  )
  fails("no caption has a language; a sample stores", language="json.nothing")
  fails("give {language: field of its captions}, or the field", languages=["de"])
  fails("has no effect; leave one", languages=FIELDS, language="json.language")
  fails("names a field more than once", languages=dict(en="json.en", us="json.en"))
  fails("languages need a source, and neither", languages=FIELDS, captions=3)
  source.value = lambda i, path: ["en", "de"]
  fails("has 1 captions, but 2 languages|has 3 captions, but 2", language="json.language")


def by_loop(z, owner, gallery, of_gallery, own):
  """Rank and average precision at R of each query that has a positive."""
  rank, precision = [], []
  for q in range(len(z)):
    others = np.arange(len(gallery)) != own[q]
    sims = np.nan_to_num((gallery @ z[q])[others], nan=-np.inf)
    positive = (of_gallery == owner[q])[others]
    if positive.any():
      rank.append(1 + np.flatnonzero(positive[np.argsort(-sims, kind="stable")])[0])
      precision.append(at_r(sims, positive))
  return np.array(rank), np.array(precision)


def metrics_of(direction, rank, precision):
  found = {f"{direction}_R@{k}": (rank <= k).mean() for k in (1, 5, 10)}
  found |= {f"{direction}_mean_rank": rank.mean()}
  found |= {f"{direction}_median_rank": np.floor(np.median(rank))}
  return found | {f"{direction}_mAP@R": precision.mean(), "num_queries": len(rank)}


@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("towers", [EXACT, COARSE], ids=["distinct", "ties"])
def test_images_find_those_of_their_class_and_not_themselves(source, axes, towers):
  source.labels[0] = 5  # the only image of its class
  rows = [i for i in range(37) if i not in source.broken]
  z, owner = np.asarray(towers[0](make_params(), source.images[rows])), source.labels[rows]
  found = make("x", dict(type="image_retrieval", source="s", batch_size=10), towers=towers, **axes)
  wanted = metrics_of("image_to_image", *by_loop(z, owner, z, owner, np.arange(len(z))))
  wanted |= dict(num_samples=36, without_positive=1, rejected=1)
  assert found(make_params()) == pytest.approx(
    {f"val/x/{k}": v for k, v in wanted.items()}, abs=1e-6
  )


def test_images_find_those_of_a_gallery_with_the_same_value(source):
  options = dict(type="image_retrieval", source="s", gallery="s", same="json.language")
  source.spoken = ["en" if i % 4 else "de" for i in range(37)]
  rows = [i for i in range(37) if i not in source.broken]
  z, owner = (
    np.asarray(embed_image(make_params(), source.images[rows])),
    np.array(source.spoken)[rows],
  )
  wanted = metrics_of("image_to_image", *by_loop(z, owner, z, owner, np.full(36, -1)))
  wanted |= dict(num_samples=36, rejected=2)
  found = make("x", options)(make_params())
  assert found == pytest.approx({f"val/x/{k}": v for k, v in wanted.items()}, abs=1e-6)
  with pytest.raises(ValueError, match=r"same='json.nothing': no sample has such a value"):
    make("x", options | dict(same="json.nothing"))
  source.labels[7] = -1
  with pytest.raises(ValueError, match="1 of 36 images have no label"):
    make("x", dict(type="image_retrieval", source="s"))(make_params())
  source.labels = np.arange(37)
  with pytest.raises(ValueError, match="none of 36 queries has another entry"):
    make("x", dict(type="image_retrieval", source="s"))(make_params())


@pytest.mark.parametrize("axes", MESHES)
def test_texts_find_those_of_their_sample(source, axes):
  params = make_params()
  texts = [(i, text) for i in range(37) for text in source.captions[i]]
  z = np.asarray(embed_text(params, *tokenise([text for _, text in texts])))
  owner = np.array([i for i, _ in texts])
  found = make("x", dict(type="text_retrieval", source="s", batch_size=10), **axes)(params)
  wanted = metrics_of("text_to_text", *by_loop(z, owner, z, owner, np.arange(len(z))))
  wanted |= dict(num_samples=len(texts), without_positive=len(texts) - wanted["num_queries"])
  assert found == pytest.approx({f"val/x/{k}": v for k, v in wanted.items()}, abs=1e-6)


def test_texts_of_one_language_find_those_of_another(source):
  params, sides = make_params(), []
  for field in ("json.en", "json.ja"):
    texts = [(i, text) for i in range(37) for text in source.texts[i][field]]
    z = np.asarray(embed_text(params, *tokenise([text for _, text in texts])))
    sides.append((z, np.array([i for i, _ in texts])))
  options = dict(type="text_retrieval", source="s", fields=["json.en"])
  found = make("x", options | dict(among=["json.ja"]))(params)
  rank, precision = by_loop(*sides[0], *sides[1], np.full(len(sides[0][0]), -1))
  wanted = metrics_of("text_to_text", rank, precision)
  wanted |= dict(num_samples=len(sides[1][0]), without_positive=len(sides[0][0]) - len(rank))
  assert found == pytest.approx({f"val/x/{k}": v for k, v in wanted.items()}, abs=1e-6)
  with pytest.raises(ValueError, match=r"no text in \['json.no'\]"):
    make("x", options | dict(among=["json.no"]))
  with pytest.raises(ValueError, match="overlap"):
    make("x", options | dict(among=["json.en"]))


def test_map_at_r_of_all_entries_is_the_average_precision_and_nan_is_no_hit():
  rng = np.random.default_rng(0)
  gallery, z = rng.normal(size=(12, E)).astype(np.float32), rng.normal(size=(E,)).astype(np.float32)

  def find(gallery, owner):
    given = jnp.asarray(gallery)[None, :, None], jnp.asarray(owner)[None]
    valid = jnp.ones((1, 12, 1), bool)
    return retrieval.precision_at_r(jnp.asarray(z)[None], jnp.array([1]), *given, valid, most=12)[0]

  np.testing.assert_allclose(find(gallery, np.ones(12, np.int32)), 1)
  first = np.argsort(-(gallery @ z))
  owner = np.zeros(12, np.int32)
  owner[first[:3]] = 1  # the first three: as the average precision, which sees all entries
  assert find(gallery, owner) == average_precision_score(owner, gallery @ z) == 1
  owner[first[2]], owner[first[9]] = 0, 1  # the third positive comes tenth
  np.testing.assert_allclose(find(gallery, owner), 2 / 3, rtol=1e-6)
  gallery[first[0]] = np.nan  # a positive
  np.testing.assert_allclose(find(gallery, owner), 1 / 3, rtol=1e-6)
  assert find(np.full_like(gallery, np.nan), owner) == 0
