"""A run that is moved to a machine without the files and variables of the one that trained it."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
import tokenizers
from helpers.shipped import load
from helpers.small_shards import samples, write_tar
from helpers.small_tokenizers import bert_json, write_pieces

import bigalign
from bigalign import evaluate, train
from bigalign.config import originals, recorded_config, resolve_config
from bigalign.data.files.checksums import Damaged
from bigalign.data.text import clip_text, stated
from bigalign.export.main import export
from bigalign.options import plain
from bigalign.report.main import report
from bigalign.run import copies

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "picture", "number", "query", ":")
TEXTS = ["a picture of a dog", "Number 3!", "", "PICTURE number <new> " * 9]


def write_json(folder, **files):
  for name, content in files.items():
    (folder / f"{name}.json").write_text(json.dumps(content))


def run_config(home):
  """One step of two narrow towers; its tokenizer, class names and templates are in $HOME_OF_ALL."""
  shards = write_tar(home / "shards/0.tar", samples(0, 16))
  c = load("tiny").to_dict() | dict(total_steps=1, batch_size=16, log_every=1, ema=0.0, mesh={})
  c["data"] |= dict(
    source=shards,
    image_size=16,
    tokenizer=dict(name="hf", path="$HOME_OF_ALL/bert/tokenizer.json", length=8),
  )
  for tower in ("image", "text"):
    c["model"][tower] |= dict(width=16, depth=1, heads=2)
  c["model"]["image"] |= dict(patch=8)
  c["model"]["text"] |= dict(vocab_size=9)
  c["writer"] = dict(tensorboard=False)
  c["evals"] = dict(
    shapes=dict(
      type="zeroshot",
      source=shards,
      classnames="$HOME_OF_ALL/names.txt",
      templates="$HOME_OF_ALL/prompts.json",
      batch_size=16,
    ),
    other=dict(type="retrieval", source=write_tar(home / "shards/1.tar", samples(16, 16))),
  )
  return c


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
  """(the folder of a run on another machine, what was found where it was trained, shards)."""
  home = tmp_path_factory.mktemp("there")
  bert_json(home / "bert", words=WORDS)
  write_json(home / "bert", tokenizer_config=dict(pad_token="[UNK]"), added_tokens={"<new>": 8})
  (home / "names.txt").write_text("picture\nnumber\nquery\n")
  write_json(home, prompts=["a {c}", "one {c}"])
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("HOME_OF_ALL", str(home))
    train.train(run_config(home), home / "run")
    found = results(home / "run", home / "exported")
  away = tmp_path_factory.mktemp("away") / "run"
  shutil.move(home / "run", away)
  for name in ("bert", "names.txt", "prompts.json"):
    shutil.move(home / name, home / f"gone-{name}")
  return away, found, home / "shards"


def results(folder, out):
  """What `evaluate`, `report`, `export` and `load` make of a run."""
  run = evaluate.open_run(folder)
  metrics = evaluate.evaluate(run)
  ids = run.config.data.make_tokenizer().encode_batch(TEXTS)
  embedded = bigalign.load(folder).embed_texts(TEXTS)
  page = report(folder).read_text().replace(str(folder), "")
  path, _ = export(run, "torch", out)
  files = {
    x.name: x.read_bytes() for x in path.iterdir() if x.suffix in (".json", ".safetensors", ".npz")
  }
  return dict(metrics=metrics, arrays=(*ids, embedded), page=page, files=files)


@pytest.mark.slow
def test_a_moved_run_is_evaluated_reported_and_exported_with_equal_results(moved, tmp_path, caplog):
  folder, there, _ = moved
  here = results(folder, tmp_path / "exported")
  for ours, theirs in zip(here.pop("arrays"), there["arrays"]):
    np.testing.assert_array_equal(ours, theirs)
  assert here == {name: value for name, value in there.items() if name != "arrays"}
  assert here["metrics"]["val/shapes-zeroshot-val-num_classes"] == 3
  assert not [x for x in caplog.records if x.levelno >= logging.WARNING]
  config = json.loads(here["files"]["bigalign.json"])["config"]
  assert config["data"]["tokenizer"]["path"] == "$HOME_OF_ALL/bert/tokenizer.json"


@pytest.mark.slow
def test_evaluators_whose_data_is_elsewhere_are_left_out_by_name(moved, caplog):
  folder, there, shards = moved
  run = evaluate.open_run(folder)
  (shards / "1.tar").rename(shards / "gone")
  metrics = evaluate.evaluate(run)
  assert metrics and metrics == {k: x for k, x in there["metrics"].items() if "zeroshot" in k}
  (text,) = [x.getMessage() for x in caplog.records if x.levelno >= logging.WARNING]
  assert text.startswith("config.evals.other is left out: ") and "1.tar" in text
  (shards / "0.tar").rename(shards / "gone too")
  with pytest.raises(FileNotFoundError, match=r"no evaluator of .*--retrieval.*0\.tar.*1\.tar"):
    evaluate.evaluate(run)
  with pytest.raises(FileNotFoundError, match=r"0\.tar"):  # by name, nothing is left out
    evaluate.evaluate(run, run.config.evals)
  page = report(folder).read_text()
  assert "The page shows no samples: " in page and "zeroshot-val-top1" in page


def tokenizers_of(home):
  """{kind: options} of tokenizers whose ids depend on files in a folder."""
  bert_json(home / "sentence/inner", words=WORDS)
  write_json(
    home / "sentence/inner",
    added_tokens={"<new>": 8},
    sentence_bert_config=dict(do_lower_case=True),
    special_tokens_map=dict(pad_token="query"),
  )
  write_json(
    home / "sentence",
    modules=[dict(path="inner")],
    config_sentence_transformers=dict(prompts=dict(q="query: "), default_prompt_name="q"),
  )
  write_pieces(home / "spiece", ["a dog and a picture", "number 3"], 40)
  (home / "wordpiece").mkdir()
  (home / "wordpiece/vocab.txt").write_text("\n".join(WORDS))
  write_json(home / "wordpiece", tokenizer_config=dict(pad_token="[SEP]", truncation_side="left"))
  (home / "words.txt").write_text("picture number dog")
  return dict(
    hf=dict(path="$TOKENIZERS/sentence/inner/tokenizer.json"),
    sentencepiece=dict(path="$TOKENIZERS/spiece.model", canonicalize=True),
    wordpiece=dict(path="$TOKENIZERS/wordpiece/vocab.txt"),
    words=dict(vocabulary="$TOKENIZERS/words.txt"),
    clip={},
    byte={},
  )


def test_copied_tokenizers_give_equal_ids(tmp_path, monkeypatch):
  home = tmp_path / "there"
  (home / "sentence").mkdir(parents=True)
  monkeypatch.setenv("TOKENIZERS", str(home))
  # CLIP's vocabulary takes a second to build; that of an installed library has no option.
  monkeypatch.setattr(clip_text, "bpe", lambda file: tokenizers.Tokenizer.from_file(str(file)))
  installed = home / "sentence/inner/tokenizer.json"
  monkeypatch.setattr(clip_text, "installed_vocabulary", lambda: installed)
  values, found = load("tiny").to_dict() | dict(evals={}), {}
  for name, options in tokenizers_of(home).items():
    values["data"] = values["data"] | dict(tokenizer=dict(name=name, length=8, **options))
    config = resolve_config(values)
    copied = copies.read(originals(config))
    copies.write(copied, tmp_path / "run")
    record = dict(config=plain(config), copies=copied.record)
    found[name] = (record, config.data.make_tokenizer())
  assert len(found["hf"][0]["copies"]) == 1 and found["byte"][0]["copies"] == {}
  shutil.move(home, tmp_path / "gone")
  shutil.move(tmp_path / "run", tmp_path / "away")
  monkeypatch.delenv("TOKENIZERS")
  for record, was in found.values():
    now = recorded_config(record, tmp_path / "away").data.make_tokenizer()
    for x, y in zip(now.encode_batch(TEXTS), was.encode_batch(TEXTS)):
      np.testing.assert_array_equal(x, y)
    assert now.from_files == was.from_files
    assert now.file is None or (tmp_path / "away/copies") in now.file.parents


@pytest.mark.parametrize("top", [".", ".."])
def test_every_file_that_changes_ids_is_copied(tmp_path, monkeypatch, top):
  """`stated.files` lists each file that `stated.near` reads."""
  folder = tmp_path / "inner"
  folder.mkdir()
  (folder / top / "modules.json").write_text("[]")
  opened = set()
  monkeypatch.setattr(stated, "read", lambda file: opened.add(file) or {})
  stated.near(folder)
  for file in opened:
    file.write_text("{}")
  assert len(opened) == 5 and opened < {*stated.files(folder)}


def test_copies_that_were_edited_are_refused_and_removed_ones_are_not_used(tmp_path):
  (tmp_path / "words.txt").write_text("picture number")
  values = load("tiny").to_dict() | dict(evals={})
  given = dict(name="words", vocabulary=str(tmp_path / "words.txt"), length=8)
  values["data"] |= dict(tokenizer=given)
  config = resolve_config(values)
  copied = copies.read(originals(config))
  copies.write(copied, tmp_path / "run")
  record = dict(config=plain(config), copies=copied.record)
  (name,) = copied.contents
  assert recorded_config(record, tmp_path / "run").data.tokenizer.option("vocabulary") == str(
    tmp_path / "run" / name
  )
  (tmp_path / "run" / name).write_text("picture dog")
  with pytest.raises(Damaged, match=r"copies/tokenizer-\w{16} was damaged or edited.*words\.txt"):
    recorded_config(record, tmp_path / "run")
  shutil.rmtree(tmp_path / "run/copies")
  assert recorded_config(record, tmp_path / "run") == config
  assert recorded_config(dict(config=record["config"]), tmp_path / "run") == config  # an older run
