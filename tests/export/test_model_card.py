"""The model card: its metadata as huggingface_hub reads it, and its code."""

from __future__ import annotations

import json
import re

import pytest
from helpers.small_models import CLIP, CLIP_LOSS, SIGLIP, SIGLIP_LOSS, make_run, word_pieces
from huggingface_hub import ModelCard

from bigalign.export import main, model_card, published
from bigalign.export.base import Contents
from bigalign.export.formats import FORMATS

ROWS = {
  "val/image_to_text_R@1": 0.25,
  "val/image_to_text_mean_rank": 7.5,
  "val/coco/text_to_image_R@5": 0.5,
  "val/signs-zeroshot-val-top1": 0.75,
  "val/signs-zeroshot-val-num_classes": 8,
  "val/num_samples": 96,
  "val/num_captions": 96,
  "ema/val/image_to_text_R@1": 0.375,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  root = tmp_path_factory.mktemp("card")
  made = make_run(root, CLIP, CLIP_LOSS, word_pieces(root))
  (made.workdir / "metrics.jsonl").write_text(json.dumps({"step": 3, **ROWS}) + "\n")
  return made


def card(run, kind="hf", *, ema=False, difference=3e-7, family="CLIPModel", **labels):
  """README.md, without the weights of a folder."""
  trained = main.trained_model(run)
  about = json.loads(json.dumps(model_card.facts(run, kind, family, ema, **labels)))
  contents = Contents(family, {}, {})
  return model_card.text(about, FORMATS[kind], contents, trained, difference)


def test_the_hub_reads_the_metadata(run):
  text = card(run, license="mit", datasets=["user/pairs", "user/more"], name="signs: small")
  data = ModelCard(text).data
  assert (data.library_name, data.pipeline_tag) == (
    "transformers",
    "zero-shot-image-classification",
  )
  assert data.license == "mit" and data.datasets == ["user/pairs", "user/more"]
  assert data.tags == ["bigalign", "image-text", "clip", "safetensors"]
  assert data.model_name == "signs: small" and data.metrics == ["recall", "accuracy"]
  results = {
    (x.task_type, x.dataset_name, x.metric_name): x.metric_value for x in data.eval_results
  }
  assert results == {
    ("image-text-retrieval", "val", "Image to text, recall@1"): 0.25,
    ("image-text-retrieval", "coco", "Text to image, recall@5"): 0.5,
    ("zero-shot-image-classification", "signs", "Top-1 accuracy"): 0.75,
  }
  assert {x.dataset_type for x in data.eval_results} == {"unknown"}


def test_what_is_not_known_is_not_stated(run):
  (run.workdir / "empty").mkdir()
  (run.workdir / "empty/metrics.jsonl").write_text('{"step": 3}\n')
  text = card(run._replace(workdir=run.workdir / "empty", address="gs://bucket/runs/clip"))
  data = ModelCard(text).data.to_dict()
  assert not {"license", "datasets", "metrics", "model-index"} & set(data)
  assert "\n# clip\n" in text and "None at this step." in text


def test_the_page_shows_the_model_first_and_the_config_folded(run):
  text = card(run, license="mit")
  headings = [line for line in text.splitlines() if line.startswith("#") and line.count("# ")]
  assert headings[:5] == ["# run", "## Usage", "## Images", "## Metrics", "## Training"]
  assert (
    "`vit` (2 layers of width 16) for images and `text` (2 layers of width 16) for texts" in text
  )
  assert "with embeddings of width 12" in text
  assert "| val/signs-zeroshot-val-top1 | 0.75 | 0.125 |" in text
  assert "match the run's (maximum relative difference 3.0e-07)" in text
  visible = re.sub(r"(?s)<details>.*</details>", "", text)
  assert "log_every" in text and "log_every" not in visible and text.endswith("</details>\n")


def test_what_is_private_of_the_options_is_not_published(run):
  """Users and passwords nowhere; folders of this machine not on the hub."""
  source = "https://me:token@host/a b.tar::/home/me/data/é.tar"
  data = {**run.meta["config"]["data"], "source": source}
  config = {**run.meta["config"], "data": data, "frozen": "/attention/"}
  made = run._replace(meta={**run.meta, "config": config})
  about = json.loads(json.dumps(model_card.facts(made, "hf", "CLIPModel", False)))
  assert about["config"]["data"]["source"] == "https://host/a b.tar::/home/me/data/é.tar"
  text = card(made)
  assert "| data | `https://host/a b.tar::/home/me/data/é.tar` (" in text
  assert "token@" not in text and "//me" not in text
  public = published.card(text, about)
  assert "| data | `https://host/a b.tar::é.tar` (" in public and "/home/me" not in public
  assert json.dumps("https://host/a b.tar::é.tar") in public
  assert '"path": "vocab.txt"' in public and str(run.workdir.parent) not in public
  assert '"frozen": "/attention/"' in public
  older = {**about, "config": config}  # written before users were left out
  facts = published.facts(older)
  assert facts["config"]["data"]["source"] == "https://host/a b.tar::é.tar"
  assert facts["config"]["frozen"] == "/attention/" and facts["step"] == 3
  assert "me:token" not in published.card(json.dumps(older), older)


@pytest.mark.parametrize(
  "given,expected",
  [
    ("parquet:/data/x/*.parquet", "parquet:*.parquet"),
    ("~/words.txt", "~/words.txt"),
    ("/", "/"),
    ("gs://bucket/run/*.tar", "gs://bucket/run/*.tar"),
    ("$DATA/x.tar", "$DATA/x.tar"),
    ("user/model", "user/model"),
    ("tfds:cifar10:train", "tfds:cifar10:train"),
  ],
)
def test_only_paths_of_this_machine_lose_their_folders(given, expected):
  about = {"config": {"data": {"sources": [given]}}}
  assert published.facts(about)["config"]["data"]["sources"] == [expected]
  assert published.card(f"`{given}` {given}", about) == f"`{expected}` {given}"


def test_a_module_next_to_the_card_comes_before_one_of_the_same_name(run):
  assert "sys.path.insert(0, folder)\nfrom model import load" in card(run, "torch")


def test_averages_show_their_own_metrics(run):
  averaged = card(run._replace(ema=run.params), ema=True)
  assert "| val/image_to_text_R@1 | 0.375 |" in averaged and "averaged parameters" in averaged
  assert [x.metric_value for x in ModelCard(averaged).data.eval_results] == [0.375]


def test_text_sides_are_for_sentence_similarity(run):
  data = ModelCard(card(run, "sentence-transformers")).data
  assert data.library_name == "sentence-transformers" and data.eval_results is None
  assert data.pipeline_tag == "sentence-similarity" and "feature-extraction" in data.tags


@pytest.mark.parametrize("kind", FORMATS)
def test_the_code_names_the_repository_of_the_hub(kind, run, tmp_path):
  if kind == "npz":
    run = make_run(tmp_path, SIGLIP, SIGLIP_LOSS, dict(name="byte", length=16))
  text = card(run, kind)
  code = text.partition("```python\n")[2].partition("```")[0]
  assert code.count("DIR") in (1, 2) and "is this folder.\n" in text
  moved = model_card.for_hub(text, FORMATS[kind], "user/clip")
  assert "DIR" not in moved and "user/clip" in moved and "local-dir" not in moved
  compile(moved.partition("```python\n")[2].partition("```")[0], kind, "exec")
  for made in (text, moved):
    assert ModelCard(made).data.library_name == FORMATS[kind].library


def test_the_code_of_big_vision_has_the_sizes_of_the_model(tmp_path):
  """big_vision cannot be installed, so only its options are compared."""
  run = make_run(tmp_path, SIGLIP, SIGLIP_LOSS, dict(name="byte", length=16))
  text = FORMATS["npz"].usage(main.trained_model(run))
  code = text.partition("config = ConfigDict(")[2].partition(")\nparams")[0]
  options = eval(code)
  sizes = dict(width=16, depth=2, num_heads=2, mlp_dim=32)
  assert options == {
    "image": sizes | dict(patch_size=(8, 8), pool_type="map"),
    "text": sizes | dict(vocab_size=259, pool_type="last"),
    "out_dim": (None, 16),
    "bias_init": 0.0,
  }
  assert '+ out["b"]' in text and "[N, 16, 16, 3]" in text
  assert not re.search(r"\{(image|text|dim|bias_init|bias|size|length)\}", text)


def test_vectors_instead_of_texts_are_called_so(tmp_path):
  model = {**CLIP, "text": dict(name="features", width=12, tokens=4)}
  trained = main.trained_model(make_run(tmp_path, model, CLIP_LOSS, dict(name="byte", length=8)))
  usage = FORMATS["torch"].usage(trained)
  assert "torch.randn(2, 5, 12)" in usage and "import torch" in usage and "a cat" not in usage
