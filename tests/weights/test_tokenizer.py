"""The tokenizer of a checkpoint: its own files give the ids, or a warning shows both."""

from __future__ import annotations

import json
import pathlib
import shutil
import types

import numpy as np
import pytest
import tokenizers
from helpers.shipped import load
from helpers.small_checkpoints import BERT, CLIP, TEXT, VISION, folder
from helpers.small_tokenizers import bert_json, write_pieces

from bigalign import weights
from bigalign.api import checkpoints
from bigalign.config import resolve_config, tokenizer_digest, tokenizer_files
from bigalign.data.files import checksums
from bigalign.data.text import clip_text, stated
from bigalign.data.text.tokenizers import make_tokenizer
from bigalign.evaluate import _warn_of_tokenizer
from bigalign.frozen.towers import like_stored
from bigalign.options import plain
from bigalign.run import provenance
from bigalign.weights import tokenizer

SIGLIP = dict(
  model_type="siglip",
  text_config=dict(TEXT, vocab_size=80, pad_token_id=1),
  vision_config=VISION,
)
STUB = {x: np.zeros(1, np.float32) for x in "abc"}


@pytest.fixture(autouse=True)
def warnings(caplog):
  """The texts of the warnings."""
  stated._warn_once.cache_clear()
  return lambda: [x.getMessage() for x in caplog.records if x.levelname == "WARNING"]


def write(path, **files):
  """JSON files of a folder, "a__json" for a.json."""
  for name, content in files.items():
    (path / f"{name}.json").write_text(json.dumps(content))
  return path


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
  """A SentencePiece model with <pad> 0 and </s> 1, as T5's."""
  stem = tmp_path_factory.mktemp("pieces") / "spiece"
  return str(write_pieces(stem, ["a dog and a cat", "two dogs, one cat!"], 40))


def ids(made, *texts):
  return made.encode_batch(list(texts))[0].tolist()


def config(init, **tok):
  return dict(
    seed=0,
    total_steps=1,
    batch_size=8,
    log_every=1,
    checkpoint_every=0,
    data=dict(source="glyphs", image_size=16, resize="squash", tokenizer=tok),
    model=dict(init=str(init)),
    loss=dict(siglip={}),
    optimizer=dict(lr=1e-3),
  )


def test_siglip_pads_as_its_config_says(tmp_path, pieces, warnings):
  """Its vocabulary has <pad>, with which it was never trained."""
  path = folder(tmp_path / "siglip", SIGLIP, STUB)
  given = dict(name="sentencepiece", path=pieces, length=6)
  assert make_tokenizer(**given).pad == 0
  options = resolve_config(config(path, **given)).data.tokenizer
  assert options.option("pad") == 1 and options.option("eos") is None
  assert ids(options.make(), "a")[0][-1] == 1
  assert not warnings()
  kept = resolve_config(config(path, **given, pad=0)).data.tokenizer
  assert kept.option("pad") == 0
  (text,) = warnings()
  assert "padding has the id 0" in text and "config.json: text_config: pad_token_id is 1" in text


def test_a_run_keeps_the_padding_with_which_it_began(tmp_path, pieces):
  path = folder(tmp_path / "siglip", SIGLIP, STUB)
  values = config(path, name="sentencepiece", path=pieces, length=6)
  resolved = resolve_config(values)
  for pad in (None, 1):
    was = dict(name="sentencepiece", path=pieces, length=6, pad=pad, eos=None)
    model = weights.init.options(values["model"])
    record = dict(model=values["model"], config=dict(model=model, data=dict(tokenizer=was)))
    assert resolve_config(values, record).data.tokenizer.option("pad") == pad
  assert resolved.data.tokenizer.option("pad") == 1


@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map"])
@pytest.mark.parametrize("token", ["</s>", {"content": "</s>", "lstrip": False}])
def test_the_padding_token_of_the_tokenizers_own_files(tmp_path, pieces, file, token):
  """Next to the model, and in the folder of the checkpoint; they come before config.json."""
  near = tmp_path / "near"
  near.mkdir()
  (near / "spiece.model").write_bytes(pathlib.Path(pieces).read_bytes())
  write(near, **{file: dict(pad_token=token)})
  assert make_tokenizer("sentencepiece", path=str(near / "spiece.model"), length=6).pad == 1
  zero = dict(SIGLIP, text_config=dict(SIGLIP["text_config"], pad_token_id=0))
  path = write(folder(tmp_path / "siglip", zero, STUB), **{file: dict(pad_token=token)})
  given = dict(name="sentencepiece", path=pieces, length=6)
  assert tokenizer.completed(weights.describe(path), given) == dict(given, pad=1)


def test_padding_that_no_file_states_is_named(tmp_path, pieces, warnings):
  text = {k: v for k, v in SIGLIP["text_config"].items() if k != "pad_token_id"}
  path = folder(tmp_path / "siglip", dict(SIGLIP, text_config=text), STUB)
  tokenizer.completed(weights.describe(path), dict(name="sentencepiece", path=pieces, length=6))
  assert any("no file states which token pads" in x and "pads with 0" in x for x in warnings())


def test_the_padding_of_clips_config_is_not_used(tmp_path):
  """It is 1 in every CLIP of transformers, which pad with the end; a causal tower ignores it."""
  path = bert_json(tmp_path / "clip")
  folder(tmp_path / "clip", dict(CLIP, text_config=dict(TEXT, pad_token_id=1)), STUB)
  given = dict(name="hf", path=path, length=6)
  assert tokenizer.completed(weights.describe(tmp_path / "clip"), given) == given


@pytest.mark.parametrize("given", [None, {}, dict(length=4), dict(name="hf"), dict(pad=9)])
def test_the_tokenizer_is_the_checkpoints(tmp_path, monkeypatch, warnings, given):
  """Its path begins with what the config names; a resumed run keeps it."""
  home = folder(tmp_path / "bert", BERT, STUB)
  bert_json(home)
  write(home, tokenizer_config=dict(model_max_length=5, pad_token="[UNK]"))
  monkeypatch.setenv("HOME_OF_BERT", str(tmp_path))
  model = dict(text=dict(init="$HOME_OF_BERT/bert/"))
  data = weights.init.completed(model, dict(tokenizer=given)).data
  own = dict(name="hf", path="$HOME_OF_BERT/bert/tokenizer.json", length=5) | (given or {})
  assert data["tokenizer"] == own
  made = make_tokenizer(**data["tokenizer"])
  assert ids(made, "A Dog") == [[2, 4, 5, 3, *([1] * (own["length"] - 4))]] or own.get("pad") == 9
  assert made.file == home / "tokenizer.json"
  shown = warnings()
  assert len(shown) == (given in (dict(length=4), dict(pad=9))), shown
  recorded = dict(pad=None, prompt=None) | own
  record = dict(model=model, config=dict(model=model, data=dict(tokenizer=recorded)))
  assert weights.init.completed(model, dict(tokenizer=given), record).data["tokenizer"] == own


def test_the_tokenizer_next_to_a_file(tmp_path, monkeypatch):
  home = folder(tmp_path / "bert", BERT, STUB)
  bert_json(home)
  monkeypatch.setenv("BERT_FILE", str(home / "model.safetensors"))
  for init, path in (
    (f"{home}/model.safetensors", f"{home}/tokenizer.json"),
    ("$BERT_FILE", f"{home}/tokenizer.json"),
  ):
    checkpoint = weights.describe(home / "model.safetensors")
    assert tokenizer.completed(checkpoint, None, init)["path"] == path


def test_siglips_tokenizer_is_its_sentencepiece_model(tmp_path, pieces, warnings):
  """Its tokenizer.json neither lower-cases nor removes punctuation."""
  home = folder(tmp_path / "siglip", SIGLIP, STUB)
  bert_json(home, lower=False)
  (home / "spiece.model").write_bytes(pathlib.Path(pieces).read_bytes())
  write(home, tokenizer_config=dict(tokenizer_class="SiglipTokenizer", pad_token="</s>"))
  checkpoint = weights.describe(home)
  path = f"{home}/spiece.model"
  expected = dict(
    name="sentencepiece",
    path=path,
    lower=True,
    canonicalize=True,
    length=TEXT["max_position_embeddings"],
  )
  assert tokenizer.completed(checkpoint, None, str(home)) == expected
  assert not warnings()
  recorded = dict(pad=None, eos=None) | expected
  assert tokenizer.as_recorded(None, recorded) == expected
  kept = tokenizer.as_recorded(dict(name="sentencepiece", path=path), recorded)
  assert kept == dict(name="sentencepiece", path=path, length=6)  # what was written is not hidden


def test_a_checkpoint_without_a_tokenizer_gives_none(tmp_path):
  checkpoint = weights.describe(folder(tmp_path / "bert", BERT, STUB))
  assert tokenizer.completed(checkpoint, None) is None
  assert tokenizer.completed(checkpoint, dict(name="byte")) == dict(name="byte", length=6)
  (tmp_path / "bert/vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
  write(tmp_path / "bert", tokenizer_config=dict(do_lower_case=False))
  path = str(tmp_path / "bert/vocab.txt")
  expected = dict(name="wordpiece", path=path, lower=False, length=6)
  assert tokenizer.completed(checkpoint, None) == expected


def test_open_clips_own_tokenizer(tmp_path, monkeypatch, warnings):
  own = bert_json(tmp_path / "installed")
  monkeypatch.setattr(clip_text, "installed_vocabulary", lambda: pathlib.Path(own))
  monkeypatch.setattr(clip_text, "bpe", lambda file: tokenizers.Tokenizer.from_file(str(file)))
  settings = dict(clean="canonicalize")
  text_cfg = dict(layers=1, context_length=7, tokenizer_kwargs=settings)
  home = folder(tmp_path / "oc", {}, STUB)
  (home / "config.json").unlink()
  model = dict(embed_dim=4, vision_cfg=dict(layers=1), text_cfg=text_cfg)
  write(home, open_clip_config=dict(model_cfg=model))
  found = tokenizer.completed(weights.describe(home), None)
  assert found == dict(name="clip", lower=True, canonicalize=True, length=7, pad=0)
  assert not warnings()


def open_clip_folder(path, **text_cfg):
  """A folder of open_clip without a tokenizer."""
  folder(path, {}, STUB)
  (path / "config.json").unlink()
  text = dict(layers=1, context_length=7) | text_cfg
  model = dict(embed_dim=4, vision_cfg=dict(layers=1), text_cfg=text)
  return write(path, open_clip_config=dict(model_cfg=model))


def clip_is_installed(tmp_path, monkeypatch):
  own = bert_json(tmp_path / "installed", lower=False)
  monkeypatch.setattr(clip_text, "installed_vocabulary", lambda: pathlib.Path(own))
  monkeypatch.setattr(clip_text, "bpe", lambda file: tokenizers.Tokenizer.from_file(str(file)))


@pytest.mark.parametrize("given", [None, {}, dict(length=5)])
def test_a_tokenizer_that_open_clip_names_is_never_clips(tmp_path, monkeypatch, given):
  """Other ids than in training would be silent: only the files of that tokenizer will do."""
  clip_is_installed(tmp_path, monkeypatch)
  home = open_clip_folder(tmp_path / "oc", hf_tokenizer_name="timm/ViT-B-16-SigLIP")
  message = r"text_cfg: hf_tokenizer_name: 'timm/ViT-B-16-SigLIP', but .*/oc holds no tokenizer\."
  with pytest.raises(ValueError, match=rf"{message} Copy its tokenizer\.json.*tokenizer=dict"):
    tokenizer.completed(weights.describe(home), given)
  chosen = dict(name="byte", length=7)
  assert tokenizer.completed(weights.describe(home), chosen) == chosen
  path = bert_json(home)
  assert tokenizer.completed(weights.describe(home), given)["path"] == path


def test_a_tokenizer_json_for_another_vocabulary_comes_before_clips(tmp_path, monkeypatch):
  """Also if CLIP's differs in less from what the files state."""
  clip_is_installed(tmp_path, monkeypatch)
  settings = dict(clean="whitespace")
  for size, name in ((11, "hf"), (clip_text.SIZE, "clip")):
    home = open_clip_folder(tmp_path / name, vocab_size=size, tokenizer_kwargs=settings)
    bert_json(home)
    assert tokenizer.of_checkpoint(weights.describe(home))["name"] == name


def test_a_kind_of_tokenizer_is_looked_for_among_the_files(tmp_path, pieces):
  """Where the folder has several, the likeliest is not always of this kind."""
  home = folder(tmp_path / "siglip", SIGLIP, STUB)
  bert_json(home)
  (home / "spiece.model").write_bytes(pathlib.Path(pieces).read_bytes())
  write(home, tokenizer_config=dict(do_lower_case=True, pad_token="[UNK]"))
  checkpoint = weights.describe(home)
  assert tokenizer.of_checkpoint(checkpoint)["name"] == "hf"
  found = tokenizer.completed(checkpoint, dict(name="sentencepiece"))
  assert found["path"] == f"{home}/spiece.model"
  assert tokenizer.completed(checkpoint, dict(name="wordpiece")) == dict(name="wordpiece", length=6)


def test_an_option_of_the_record_is_not_kept_for_a_tokenizer_that_is_named(tmp_path):
  """A run that began with lower=False cannot be resumed without it: its ids would be unchanged."""
  recorded = dict(name="clip", path=None, lower=False, canonicalize=False, length=7, pad=0)
  kept = tokenizer.as_recorded(dict(name="clip"), recorded)
  assert kept == dict(name="clip", length=7)
  own = dict(name="clip", lower=False, canonicalize=False, length=7)
  assert tokenizer.as_recorded(None, recorded) == own  # that of the checkpoint


def test_a_loaded_model_refuses_ids_that_its_tower_lacks(tmp_path):
  """An index past the end of a table is not an error on the device: it reads the last row."""
  path = bert_json(tmp_path / "bert")
  for table, length, wrong in ((9, 6, "vocab_size=9"), (10, 5, "length=5"), (10, 6, "")):
    sizes = types.SimpleNamespace(vocab_size=table, length=length)
    encoder = types.SimpleNamespace(text_tower=types.SimpleNamespace(options=sizes))
    config = dict(data=dict(tokenizer=dict(name="hf", path=path, length=6)), model={})
    made = pytest.raises(ValueError if wrong else KeyError, match=wrong or "embed_dim")
    with made as error:
      checkpoints._model(tmp_path / "bert", {}, encoder=encoder, params={}, config=config)
    if wrong:
      assert f"bert: text.{wrong} is too small for the tokenizer 'hf', which" in str(error.value)


def test_another_tokenizer_than_the_checkpoints_is_shown_with_ids(tmp_path, warnings):
  home = folder(tmp_path / "bert", BERT, STUB)
  bert_json(home)
  other = bert_json(tmp_path / "other", words=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "dog", "a"))
  tokenizer.completed(weights.describe(home), dict(name="hf", path=other, length=6))
  (text,) = warnings()
  assert "'a photo of a dog' [2, 5, 1, 1, 5, 3], not [2, 4, 1, 1, 4, 3]" in text
  stated._warn_once.cache_clear()
  same = bert_json(tmp_path / "same")
  tokenizer.completed(weights.describe(home), dict(name="hf", path=same, length=6))
  assert warnings() == [text]


def test_a_tokenizer_json_is_completed_by_the_files_next_to_it(tmp_path, warnings):
  """Each value is what AutoTokenizer of transformers 5.23 gives for the folder."""
  path = bert_json(tmp_path / "bert")
  assert ids(make_tokenizer("hf", path=path, length=6), "A Dog") == [[2, 4, 5, 3, 0, 0]]
  write(
    tmp_path / "bert",
    tokenizer_config=dict(
      tokenizer_class="BertTokenizer",
      do_lower_case=False,
      pad_token="[UNK]",
      truncation_side="left",
      added_tokens_decoder={"10": dict(content="<new>", special=False)},
      model_max_length=6,
    ),
  )
  made = make_tokenizer("hf", path=path, length=6)
  assert ids(made, "A Dog", "dog <new>") == [[2, 6, 7, 3, 1, 1], [2, 5, 10, 3, 1, 1]]
  assert ids(made, "a dog a dog A") == [[2, 5, 4, 5, 6, 3]]
  assert made.vocab_size == 11
  assert not warnings()


def test_case_of_sentence_transformers_and_its_length_and_prompt(tmp_path, warnings):
  """Settings of three files."""
  path = bert_json(tmp_path / "sentence", lower=False)
  folder(tmp_path / "sentence", BERT, STUB)
  write(
    tmp_path / "sentence",
    modules=[dict(type="a.Transformer", path="")],
    sentence_bert_config=dict(max_seq_length=5, do_lower_case=True),
    config_sentence_transformers=dict(
      prompts=dict(query="query: ", other=""), default_prompt_name="query"
    ),
  )
  made = make_tokenizer("hf", path=path, length=6)
  assert ids(made, "A Dog") == [[2, 8, 9, 4, 5, 3]]
  (text,) = warnings()
  assert "cut at this number of tokens: 6" in text and "max_seq_length is 5" in text
  assert ids(make_tokenizer("hf", path=path, length=5, prompt=""), "A Dog") == [[2, 4, 5, 3, 0]]
  assert "the prompt before each text is '', but" in warnings()[-1]
  checkpoint = weights.describe(tmp_path / "sentence")
  completed = tokenizer.completed(checkpoint, dict(name="hf", path=path, length=5))
  assert make_tokenizer(**completed).prompt == "query: "


@pytest.mark.parametrize(
  "files,texts",
  [
    (
      dict(tokenizer_config=dict(do_lower_case=True)),
      ["ignores case: False", "case is T"],
    ),
    (
      dict(tokenizer_config=dict(tokenizer_class="SiglipTokenizer")),
      ["case and punctuation: False", "tokenizer_class: SiglipTokenizer is True"],
    ),
    (
      dict(tokenizer_config=dict(tokenizer_class="XLMRobertaTokenizerFast")),
      ["ids are those of the SentencePiece model", "'XLMRobertaTokenizerFast'"],
    ),
    (
      dict(tokenizer_config=dict(padding_side="left")),
      ["on the side 'right'", "'left'"],
    ),
    (dict(tokenizer_config=dict(add_bos_token=True)), ["precedes each text: False", "add_bos_tok"]),
    (
      dict(tokenizer_config=dict(add_eos_token=False)),
      ["ends each text: True", "add_eos"],
    ),
    (dict(added_tokens={"<image>": 40}), ["'<image>' has the id None", "added_tokens.json is 40"]),
    (dict(tokenizer_config=dict(pad_token="<none>")), ["'<none>', which the vocabulary lacks"]),
    (dict(tokenizer_config=dict(model_max_length=9)), ["tokens: 6", "model_max_length is 9"]),
    (
      dict(tokenizer_config=dict(additional_special_tokens=["<a>", {"content": "<b>"}])),
      ["the vocabulary lacks '<a>', but", "lacks '<b>'", "additional_special_tokens has it"],
    ),
    (dict(tokenizer_config=dict(eos_token="<pad>")), ["ends with the id 0", None]),
  ],
)
def test_what_differs_is_shown_with_both_values(tmp_path, pieces, warnings, files, texts):
  (tmp_path / "spiece.model").write_bytes(pathlib.Path(pieces).read_bytes())
  write(tmp_path, **files)
  made = make_tokenizer("sentencepiece", path=str(tmp_path / "spiece.model"), length=6)
  if None in texts:  # taken
    assert made.eos == 0
    return
  (text,) = warnings()
  for part in texts:
    assert part in text


def test_which_file_comes_first(tmp_path):
  """As in transformers 5.23: special_tokens_map.json, unless the other one lists all tokens."""
  path = bert_json(tmp_path / "bert")
  write(tmp_path / "bert", special_tokens_map=dict(pad_token="[SEP]"))
  for more, pad in (({}, 3), (dict(added_tokens_decoder={}), 1)):
    write(tmp_path / "bert", tokenizer_config=dict(pad_token="[UNK]", **more))
    assert make_tokenizer("hf", path=path, length=6).pad == pad
  generic = dict(tokenizer_class="PreTrainedTokenizerFast", do_lower_case=False)
  write(tmp_path / "bert", tokenizer_config=generic)
  assert ids(make_tokenizer("hf", path=path, length=4), "A Dog") == [[2, 4, 5, 3]]


@pytest.mark.parametrize(
  "text_cfg,texts",
  [
    (dict(tokenizer_kwargs=dict(clean="canonicalize")), ["case and punctuation", "canonicalize"]),
    (dict(tokenizer_kwargs=dict(clean="whitespace")), ["ignores case: True", "lower is False"]),
    (dict(tokenizer_kwargs=dict(strip_sep_token=True)), ["strip_sep_token (not possible here)"]),
    (dict(context_length=5), ["number of tokens: 6", "context_length is 5"]),
  ],
)
def test_open_clips_settings_of_its_tokenizer(tmp_path, warnings, text_cfg, texts):
  path = bert_json(tmp_path / "oc")
  model = dict(embed_dim=4, vision_cfg=dict(layers=1), text_cfg=dict(layers=1) | text_cfg)
  folder(tmp_path / "oc", {}, STUB)
  (tmp_path / "oc/config.json").unlink()
  write(tmp_path / "oc", open_clip_config=dict(model_cfg=model))
  tokenizer.completed(weights.describe(tmp_path / "oc"), dict(name="hf", path=path, length=6))
  (text,) = warnings()
  for part in texts:
    assert part in text


def test_a_damaged_file_is_named(tmp_path):
  path = bert_json(tmp_path / "bert")
  (tmp_path / "bert/tokenizer_config.json").write_text("[1]")
  with pytest.raises(ValueError, match=r"tokenizer_config\.json: not a JSON object"):
    make_tokenizer("hf", path=path, length=6)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog"]
OTHER_IDS = {
  "padding": ("hf", dict(tokenizer_config=dict(pad_token="[UNK]")), "pad: was 0, now 1"),
  "case": (
    "hf",
    dict(tokenizer_config=dict(do_lower_case=False)),
    "lower: was True, now False",
  ),
  "case of the text": (
    "hf",
    dict(sentence_bert_config=dict(do_lower_case=True)),
    "text_lower: was False, now True",
  ),
  "an added token": (
    "hf",
    dict(added_tokens={"<new>": 10}),
    r"added_tokens: was '0 \[\]', now .*'<new>=10'",
  ),
  "side": (
    "hf",
    dict(tokenizer_config=dict(truncation_side="left")),
    "truncation_side: was 'right', now 'left'",
  ),
  "prompt": (
    "hf",
    dict(
      modules=[],
      config_sentence_transformers=dict(prompts=dict(q="query: "), default_prompt_name="q"),
    ),
    "prompt: was '', now 'query: '",
  ),
  "accents": (
    "wordpiece",
    dict(tokenizer_config=dict(strip_accents=False)),
    "accents: was None, now False",
  ),
  "padding of wordpiece": (
    "wordpiece",
    dict(special_tokens_map=dict(pad_token="[SEP]")),
    "pad: was 0, now 3",
  ),
  "pieces": (
    "sentencepiece",
    dict(tokenizer_config=dict(pad_token="</s>", eos_token="<unk>")),
    "pad: was 0, now 1; eos: was 1, now 2",
  ),
}


@pytest.mark.parametrize("name,files,said", OTHER_IDS.values(), ids=OTHER_IDS)
def test_a_resumed_run_notices_other_ids_from_files(tmp_path, pieces, name, files, said):
  home = tmp_path / "tokenizer"
  path = bert_json(home)
  if name == "wordpiece":
    path = str(home / "vocab.txt")
    pathlib.Path(path).write_text("\n".join(WORDS) + "\n")
  if name == "sentencepiece":
    path = shutil.copy(pieces, home)
  options = dict(name=name, path=path, length=6)

  def recorded():
    config = resolve_config(
      load("tiny").to_dict() | dict(data=dict(source="x", image_size=8, tokenizer=options))
    )
    names = dict(tokenizer=tokenizer_digest(config), tokenizer_files=tokenizer_files(config))
    return dict(data="", **names)

  before = recorded()
  write(home, special_tokens_map=dict(mask_token="[MASK]"), tokenizer_config=dict(a="b"))
  provenance.check_data(before, json.loads(json.dumps(recorded())), tmp_path, False)
  write(home, **files)
  now = json.loads(json.dumps(recorded()))
  with pytest.raises(ValueError, match=rf"give other ids: .*{said}.*--allow_config_change"):
    provenance.check_data(before, now, tmp_path, False)
  provenance.check_data(before, now, tmp_path, True)
  older = {key: value for key, value in before.items() if key != "tokenizer_files"}
  provenance.check_data(older, now, tmp_path, False)
  # Stores of texts know it too, and older ones stay usable.
  (tmp_path / "header.json").write_text(json.dumps(checksums.seal(dict(tokenizer="1"))))
  assert like_stored(tmp_path, dict(tokenizer="1", tokenizer_files=now)) == dict(tokenizer="1")


def test_evaluating_with_other_ids_than_in_training_warns(tmp_path, warnings):
  path = bert_json(tmp_path / "tokenizer")
  options = dict(name="hf", path=path, length=6)
  values = load("tiny").to_dict() | dict(data=dict(source="x", image_size=8, tokenizer=options))
  config = resolve_config(values)
  files = tokenizer_files(config)
  meta = dict(config=plain(config), tokenizer=tokenizer_digest(config), tokenizer_files=files)
  _warn_of_tokenizer(meta, config, config, tmp_path)
  assert not warnings()
  write(tmp_path / "tokenizer", tokenizer_config=dict(pad_token="[UNK]"))
  _warn_of_tokenizer(meta, config, config, tmp_path)
  assert "pad: was 0, now 1. Texts are embedded with the ids of the present files" in warnings()[-1]
  (tmp_path / "tokenizer/tokenizer_config.json").unlink()
  bert_json(tmp_path / "tokenizer", enable_padding=dict(pad_id=0, length=4))
  _warn_of_tokenizer(meta, config, config, tmp_path)
  assert "its file has another content than in training" in warnings()[-1]
  pathlib.Path(path).unlink()
  before = len(warnings())
  _warn_of_tokenizer(meta, config, config, tmp_path)
  assert len(warnings()) == before
