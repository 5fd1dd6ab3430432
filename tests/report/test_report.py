"""The page of a run is complete, well formed, escaped and self-contained."""

from __future__ import annotations

import base64
import html.parser
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.shipped import load
from PIL import Image

from bigalign import evaluate, sharding
from bigalign.captions import BEAMS, Written
from bigalign.config import resolve_config
from bigalign.data.samples.labels import Labels
from bigalign.evals.chance import chance
from bigalign.evals.confusion import Confusion
from bigalign.evals.segmentation import Segmented
from bigalign.evals.zeroshot import Zeroshot
from bigalign.options import plain
from bigalign.report import figures, main, sections
from bigalign.report.sections import Pairs

VOID = {"meta", "img", "br", "hr", "link", "input"}
EVIL = '<script>alert("x")</script> & $x^2$'


class Page(html.parser.HTMLParser):
  """Collects the content of a page; fails on tags that do not close."""

  def __init__(self):
    super().__init__()
    self.open, self.tags, self.sources, self.heads, self.words = [], [], [], [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    if tag not in VOID:
      self.open.pop()

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.words.append(data)
    if self.open and self.open[-1] in ("h1", "h2", "h3"):
      self.heads.append(data)


def parse(text):
  page = Page()
  page.feed(text)
  page.close()
  assert not page.open
  return page


def make_config(**changes):
  """configs/tiny.py without evaluators, with changes."""
  values = load("tiny").to_dict()
  data = values["data"] | changes.pop("data", {})
  return resolve_config(values | {"evals": {}, "data": data} | changes)


def make_run(tmp_path, **changes):
  config = make_config(loss={"clip": {"weight": 1.0}}, **{"data": {"source": EVIL}, **changes})
  versions = {"bigalign": "0.1", "jax": "1"}
  meta = dict(
    samples_seen=2560, revision="abc", data="f00", versions=versions, config=plain(config)
  )
  params = {"model/x": jnp.zeros((3, 4))}
  return evaluate.Run(tmp_path, 40, config, meta, None, params, {}, {})


def make_pairs(n=20, e=8, captions=None):
  rng = np.random.default_rng(0)
  zimg, ztxt = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in rng.normal(size=(2, n, e)))
  captions = captions or [f"caption {i}" for i in range(n - 1)] + [EVIL]
  return Pairs("20 samples", rng.integers(0, 256, (n, 32, 32, 3), np.uint8), captions, zimg, ztxt)


def make_rows():
  rows = []
  for step in range(0, 50, 10):
    rows.append(
      {
        "step": step,
        "train/loss": 5.0 / (step + 1),
        "train/clip/logit_scale": 14.0 + step,
        "train/lr": 1e-3,
        "train/samples_per_second": 100.0 + step,
        "perf/data_share": 0.1,
      }
    )
    rows.append(
      {
        "step": step,
        "val/image_to_text_R@1": step / 100,
        "val/image_to_text_R@5": 0.5,
        "val/num_samples": 100,
        "val/num_captions": 100,
        f"val/{EVIL}-zeroshot-val-top1": 0.25,
        f"val/{EVIL}-zeroshot-val-num_classes": 10,
        "ema/val/image_to_text_R@1": 0.75,
      }
    )
  return rows


def test_page_is_complete_escaped_and_self_contained(tmp_path):
  text = main.page(make_run(tmp_path), make_rows(), make_pairs())
  page = parse(text)
  assert {
    "Result",
    "Learning",
    "Geometry",
    "Retrieval",
    "Throughput",
    "All evaluation metrics",
    "Config",
    "Versions",
  } <= {*page.heads}
  assert page.tags.count("svg") == 7  # five curves (no gradient), the matrix, the sphere
  assert page.tags.count("img") > 20
  assert "script" not in page.tags
  words = " ".join(page.words)
  for word in ("40.0", "chance 1.0 %", "40× chance", "abc", "f00", "2,560", EVIL):
    assert word in words, word
  assert all(re.match(r"data:image/(png|jpeg);base64,|#", source) for source in page.sources)
  assert not re.search(r"https?:|url\((?!#)|@import", text)


def test_captions_of_the_model_are_shown_and_escaped():
  pairs = make_pairs()
  assert sections.captions(pairs) == ""
  written = [Written("a <b>dog</b>", "two dogs"), Written("", "a cat")]
  page = parse(sections.captions(pairs._replace(written=written)))
  words = " ".join(page.words)
  assert "Captions" in page.heads and page.tags.count("img") == 2 and "b" not in page.tags
  for text in ("a <b>dog</b>", "two dogs", "(no word)", "a cat", pairs.captions[1]):
    assert text in words
  assert page.words.count("greedy") == page.words.count(f"{BEAMS} beams") == 2


def test_segmentations_are_shown_with_the_names_of_their_classes():
  rng = np.random.default_rng(0)
  labels, found = rng.integers(0, 3, (2, 2, 32, 32), np.int32)
  labels[0, :4] = -1
  found[1] = labels[1]
  images = rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
  shown = Segmented(["sky", "<b>", "sea", "not there"], images, labels, found)
  page = parse(sections.segmentation("ade", shown))
  words = " ".join(page.words)
  assert page.tags.count("img") == 6 and "b" not in page.tags and "<b>" in words
  assert "sky" in words and "not there" not in words
  right = sections.percent(float((labels == found)[0][4:].mean()))
  assert f"correct places: {right} %" in words and "correct places: 100.0 %" in words
  colours = figures.class_colours(4)
  assert len({*map(tuple, colours.tolist())}) == 4
  url = figures.class_map(labels[0], colours)
  drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
  assert (drawn[:4] == 128).all() and (drawn[4:] == colours[labels[0, 4:]]).all()


def test_confused_classes_are_shown_with_their_names():
  label = np.array([0] * 8 + [1] * 4 + [2] * 3)
  found = np.array([0] * 4 + [1] * 3 + [2] + [1] * 4 + [0, 0, -1])
  shown = Confusion(["ant", "<b>", "cat", "not there"], label, found)
  page = parse(sections.confusion("pets", shown))
  words = " ".join(page.words)
  assert "Classes: pets" in page.heads and "b" not in page.tags
  for text in ("ant <b> 3 of 8 37.5 %", "cat ant 2 of 3 66.7 %", "ant cat 1 of 8 12.5 %"):
    assert text in words, words
  assert "cat 0.0 % ant 50.0 % <b> 100.0 %" in words and "1 of 4 classes have no image" in words
  assert words.index("ant <b>") < words.index("cat ant") < words.index("ant cat")


def test_classes_are_shown_of_evaluators_that_have_them(tmp_path, monkeypatch, caplog):
  """Not of those whose data is not here, with several languages, or with too many images."""
  shown = Confusion(["ant"], np.zeros(1, int), np.zeros(1, int))
  names = ("small", "large", "gone", "languages")
  evals = {name: dict(type="zeroshot", source=name) for name in names}
  run = make_run(tmp_path, evals=evals | dict(pairs=dict(type="retrieval", source="pairs")))
  run = run._replace(mesh=sharding.make_mesh())

  def made(evals, **kwargs):
    (name,) = evals
    if name == "gone":
      open(tmp_path / "gone.tar").close()
    samples = main.CLASSIFIED + (name == "large")
    evaluator = Zeroshot(dict, samples, lambda params: shown)
    return {name: dict if name == "languages" else evaluator}

  monkeypatch.setattr(main, "make_evaluators", made)
  assert main.confused(run) == {"small": shown}
  assert "config.evals.large: more than 50000 images" in caplog.text
  assert "config.evals.gone: " in caplog.text and "gone.tar" in caplog.text
  page = parse(main.page(run, make_rows(), make_pairs(), None, {"small": shown}))
  assert "Classes: small" in page.heads


def test_equal_runs_give_equal_pages(tmp_path):
  pages = {main.page(make_run(tmp_path), make_rows(), make_pairs()) for _ in range(2)}
  assert len(pages) == 1


def test_page_of_a_run_without_metrics_and_with_one_caption(tmp_path):
  pairs = make_pairs(n=4, captions=["same"] * 4)
  page = parse(main.page(make_run(tmp_path), [], pairs))
  assert "Geometry" in page.heads and "Result" not in page.heads and "Retrieval" not in page.heads


def test_the_page_of_a_run_on_a_mixture_names_all_its_sources(tmp_path):
  parts = [{"name": x, "source": f"{x}/*.tar", "weight": 1.0} for x in ("first", "second")]
  values = load("tiny").to_dict()
  data = {k: x for k, x in values["data"].items() if k != "source"}
  config = resolve_config(values | {"evals": {}, "data": data | {"mixture": parts}})
  run = make_run(tmp_path)._replace(config=config)
  words = "".join(parse(main.page(run, [], make_pairs())).words)
  assert "first/*.tar::second/*.tar" in words
  assert main.held_out(config)[0] == "first/*.tar"


def test_margins_equal_a_sort():
  rng = np.random.default_rng(1)
  sims, positive = rng.normal(size=(9, 12)), rng.random((9, 12)) < 0.2
  positive[:, 3] = True
  margin, rank = sections.margins(sims, positive)
  for q in range(9):
    order = np.argsort(-sims[q])
    # The rank of the best positive: only wrong answers can come before it.
    assert rank[q] == 1 + np.argmax(positive[q][order])
    assert margin[q] == sims[q][positive[q]].max() - sims[q][~positive[q]].max()


def test_principal_axes_are_those_of_the_covariance():
  z = np.random.default_rng(2).normal(size=(50, 6)) * np.arange(1, 7)
  xy, shares = figures.principal(z)
  values = np.linalg.eigvalsh(np.cov(z.T))[::-1]
  np.testing.assert_allclose(xy.var(0, ddof=1), values[:2], rtol=1e-9)
  np.testing.assert_allclose(shares, values[:2] / values.sum(), rtol=1e-9)


def test_chance_is_what_random_embeddings_score():
  levels = chance(
    {
      "val/image_to_text_R@5": 0,
      "val/text_to_image_R@10": 0,
      "val/num_samples": 100,
      "val/num_captions": 500,
      "val/x-zeroshot-val-top5": 0,
      "val/x-zeroshot-val-num_classes": 4,
      "val/g-seen-all-top1": 0,
      "val/g-seen-all-top5": 0,
      "val/g-seen-all-chance": 0.01,
      "other": 1,
    }
  )
  rng = np.random.default_rng(3)
  hits = [(rng.permutation(500)[:5] < 5).any() for _ in range(20000)]
  assert levels["val/image_to_text_R@5"] == pytest.approx(np.mean(hits), abs=5e-3)
  assert levels["val/text_to_image_R@10"] == pytest.approx(0.1)
  assert levels["val/x-zeroshot-val-top5"] == 1 and levels["val/g-seen-all-top1"] == 0.01
  assert len(levels) == 4


def test_languages_with_the_lowest_scores_are_listed_and_have_no_cards():
  recalls = {f"l{i}": (i * 7) % 12 / 100 for i in range(12)}
  values = {"val/x/num_languages": 12, "val/x/num_samples": 9, "ema/val/x/num_languages": 12}
  for language, recall in recalls.items():
    own = {"text_to_image_R@1": recall, "image_to_text_R@1": 0.5, "num_samples": 9}
    values |= {f"val/x/{language}-{name}": x for name, x in (own | {"num_captions": 9}).items()}
  values |= {"val/x/mean_text_to_image_R@1": 0.055, "val/x/mean_image_to_text_R@1": 0.5}
  values |= {f"val/y-zeroshot-val-{name}": 0.25 for name in ("de-top1", "mean_top1")}
  values |= {"val/y-zeroshot-val-num_languages": 1, "val/y-zeroshot-val-de-num_samples": 4}
  html = sections.languages(values)
  shown = re.findall(r"<tr><td>(\w[\w ]*)</td>", html)
  order = sorted(recalls, key=recalls.__getitem__)
  assert shown == [*order[:10], "mean of all", "de", "mean of all"]
  assert "The 10 of 12 languages" in html and "<td class=n>5.5 %</td>" in html
  assert sections.groups(values, chance(values)) == {}
  assert sections.languages({"val/text_to_image_R@1": 0.5}) == ""


def test_corruptions_are_drawn_over_their_severity():
  start = "val/x-corruptions-"
  values = {f"{start}{name}": x for name, x in dict(top1=0.8, mean_top1=0.4).items()}
  values |= {f"{start}relative_drop": 0.5, f"{start}num_classes": 10}
  values |= {
    f"{start}{kind}-{n}-top1": 0.7 - n / 10 for kind in ("jpeg", "contrast") for n in (1, 3)
  }
  html = sections.corruptions(values)
  assert html.count("<svg") == 1 and "jpeg" in html and "contrast" in html
  assert "The mean over all kinds and severities is 40.0 %. 50.0 % of the accuracy" in html
  assert list(sections.groups(values, chance(values))) == ["val/x-corruptions"]  # one card
  assert sections.corruptions({"val/x-zeroshot-val-top1": 0.5}) == ""


def test_geometry_over_training_is_drawn_if_it_was_measured_several_times():
  names = ("centroid_distance", "alignment", "uniformity_img", "hubness_i2t", "effective_rank_img")
  rows = [{"step": step} | {f"val/sphere/{x}": step + 1.5 for x in names} for step in (1, 5, 9)]
  html = sections.geometry_over_training(rows)
  assert html.count("<svg") == 5 and "Geometry over training: sphere" in html
  assert sections.geometry_over_training(rows[:1]) == ""
  assert sections.geometry_over_training([{"step": 1, "train/loss": 3.0}]) == ""


@pytest.mark.slow
def test_negative_values_have_no_logarithmic_scale():
  def drawn(last, log):
    return figures.curves({"loss": ([0, 1, 2], [1.0, 100.0, last])}, title="loss", log=log)

  assert drawn(-1.0, True) == drawn(-1.0, False)  # of a surrogate
  assert drawn(float("nan"), True) != drawn(float("nan"), False)


def test_temperatures_of_samples_are_drawn(monkeypatch):
  drawn = {}

  def curves(lines, *, title, **options):
    drawn[title] = lines
    return ""

  monkeypatch.setattr(sections.figures, "curves", curves)
  names = {f"train/temperature/text/{name}": 0.1 for name in ("p5", "p50", "p95")}
  names["train/temperature/text/caption_frequency_slope"] = 0.02
  names["train/temperature/isogclr/image/p50"] = 0.3
  sections.learning([{"step": i, **names} for i in range(2)], {})
  assert drawn == {
    "temperatures of the samples, text": {
      name: ([0, 1], [0.1, 0.1]) for name in ("p95", "p50", "p5")
    },
    "temperatures of the samples, isogclr/image": {"p50": ([0, 1], [0.3, 0.3])},
    "temperature per tenfold caption frequency": {"text": ([0, 1], [0.02, 0.02])},
  }


def test_held_out_pairs_of_a_config_are_embedded(monkeypatch, tmp_path):
  class Source:
    fingerprint, classnames = "0", ("ant", "bee")

    def __len__(self):
      return 30

    def __getitem__(self, i):
      captions = () if i % 2 else (f"caption {i}", "second")
      image = b"bad" if i == 4 else np.full((6, 6, 3), i, np.uint8)
      return dict(image=image, captions=captions, key=str(i), label=i % 2)

  asked = []
  monkeypatch.setattr(
    main,
    "open_source",
    lambda spec, captions=None, frames=False: asked.append((spec, captions)) or Source(),
  )
  mesh = sharding.make_mesh()
  embed = dict(
    embed_image=lambda p, x: jnp.stack([x[:, 0, 0, 0] * 1.0, jnp.ones(len(x))], 1),
    embed_text=lambda p, ids, mask: jnp.stack([ids.sum(1) * 1.0, mask.sum(1) * 1.0], 1),
  )
  data = dict(image_size=6, tokenizer=dict(name="byte", length=16), captions=("txt",))
  run = make_run(
    tmp_path, data=data, evals={"val": dict(type="retrieval", source="here", fields=["a"])}
  )._replace(mesh=mesh, embed=embed)
  pairs = main.embed_pairs(run)
  assert asked == [("here", ("a",))]
  kept = [i for i in range(30) if i != 4]
  np.testing.assert_array_equal(pairs.zimg[:, 0], kept)
  np.testing.assert_array_equal([image[0, 0, 0] for image in pairs.images], kept)
  assert pairs.captions == ["bee" if i % 2 else f"caption {i}" for i in kept]
  assert pairs.ztxt[0, 1] == len("caption 0") + 1
  assert jax.device_count() == 8 and "averages" not in pairs.where
  # The headline figures are those of the parameters, so the pairs are too.
  averaged = main.embed_pairs(run._replace(ema={"model/x": jnp.zeros((3, 4))}))
  assert averaged.where.endswith("by the parameters and not by their running averages")
  used = []
  embed["embed_image"] = lambda p, x: (used.append(p), jnp.ones((len(x), 2)))[1]
  main.embed_pairs(run._replace(ema={"model/y": jnp.zeros(1)}, embed=embed))
  assert used and all(params.keys() == run.params.keys() for params in used)


@pytest.mark.parametrize(
  "evals, source",
  [
    ({"a": dict(type="glyphs", split="heldout_dev")}, "glyphs:heldout_dev"),
    ({"a": dict(type="zeroshot", source="x")}, "x"),
    ({"a": dict(type="geometry", source="x")}, "x"),
    (dict(a=dict(type="retrieval", text_store="t"), b=dict(type="geometry", source="x")), "x"),
    ({}, "train"),
    (None, "train"),
  ],
)
def test_held_out_samples_are_those_of_the_evaluators(evals, source):
  changes = {} if evals is None else {"evals": evals}
  config = make_config(data=dict(source="train"), **changes)
  assert main.held_out(config)[0] == source


def test_a_model_that_takes_stored_vectors_has_no_pairs_to_show(tmp_path):
  towers = dict(image=dict(name="features", width=4), text=dict(name="features", width=4))
  run = make_run(tmp_path, model=towers | dict(embed_dim=2))
  with pytest.raises(FileNotFoundError, match=r"config\.model\.image is 'features'"):
    main.embed_pairs(run)


def test_data_that_is_not_here_differs_from_a_bug(monkeypatch, tmp_path):
  """The page of a run needs no data, so only a variable that is not set may pass for that."""
  monkeypatch.delenv("PETS_OF_THIS_TEST", raising=False)
  away = dict(type="retrieval", source="$PETS_OF_THIS_TEST/x.tar")
  with pytest.raises(FileNotFoundError, match="variable PETS_OF_THIS_TEST is not set"):
    main.embed_pairs(make_run(tmp_path, evals={"val": away}))

  def open_source(spec, captions=None, frames=False):
    return {}["a bug"]

  monkeypatch.setattr(main, "open_source", open_source)
  with pytest.raises(KeyError, match="a bug"):
    main.embed_pairs(make_run(tmp_path, evals={"val": dict(away, source="here")}))


def test_captions_are_the_class_names_that_the_evaluator_has(monkeypatch, tmp_path):
  """Also if the source has other names, or its labels are names."""
  (tmp_path / "names.txt").write_text("cat\ndog\n")

  class Source:
    fingerprint, classnames = "0", ("wrong", "names")
    labels = Labels(classnames, what="cls")

    def __len__(self):
      return 4

    def __getitem__(self, i):
      label = self.labels(("cat", "dog")[i % 2], key=str(i))
      image = np.full((6, 6, 3), i, np.uint8)
      return dict(image=image, captions=(), key=str(i), label=label)

  seen = []

  class Stop(Exception):
    pass

  def batches(picked, *args, **options):
    seen.extend(picked[i]["captions"][0] for i in range(len(picked)))
    raise Stop

  monkeypatch.setattr(main, "open_source", lambda spec, captions=None, frames=False: Source())
  monkeypatch.setattr(main.evaluation, "eval_batches", batches)
  one = dict(type="zeroshot", source="here", classnames=str(tmp_path / "names.txt"))
  with pytest.raises(Stop):
    main.embed_pairs(make_run(tmp_path, evals={"pets": one}))
  assert sorted(seen) == ["cat", "cat", "dog", "dog"]


def test_zeroshot_folders_of_clip_benchmark(tmp_path):
  with pytest.raises(ValueError, match=r"zeroshot \(--zeroshot\)=gs://bucket/pets: a folder"):
    evaluate.zeroshot_folder("gs://bucket/pets")
  with pytest.raises(FileNotFoundError, match=r"nothing: there is no such folder"):
    evaluate.zeroshot_folder(tmp_path / "nothing")
  (tmp_path / "pets/test").mkdir(parents=True)
  (tmp_path / "pets/test/0.tar").touch()
  with pytest.raises(FileNotFoundError, match=r"classnames\.txt"):
    evaluate.zeroshot_folder(tmp_path / "pets")
  (tmp_path / "pets/classnames.txt").write_text("cat\ndog\n")
  for given in ("pets", "pets/test"):
    name, options = evaluate.zeroshot_folder(tmp_path / given)
    assert name == "pets" and options["source"] == str(tmp_path / "pets/test/*.tar")
    assert "templates" not in options
  (tmp_path / "pets/zeroshot_classification_templates.txt").write_text("a {c}\n")
  assert evaluate.zeroshot_folder(tmp_path / "pets")[1]["templates"].endswith("templates.txt")


def test_a_folder_without_a_run_is_an_error(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"config\.json.*--workdir"):
    evaluate.open_run(tmp_path)


@pytest.mark.parametrize("sims", [[0.1, 0.9, 0.8, 0.7, 0.6], [0.5] * 5])
def test_the_correct_match_is_always_shown(sims):
  """Last if others are nearer; equal similarities have one rank."""
  correct = [False] * 4 + [True]
  assert sections._shown(np.array(sims), correct, 3)[-1] == 4
  assert (
    sections._shown(np.array(sims), [False] * 5, 3)
    == sections._shown(np.array(sims), [True] * 5, 3)[:2]
  )
  texts = [f"text {i}" for i in range(5)]
  pairs = make_pairs(1, captions=["text 4"])
  card = sections._image_card(pairs, 0, texts, np.array(sims), 5)
  assert card.count("<li") == 3 and "<li class=hit>" in card
