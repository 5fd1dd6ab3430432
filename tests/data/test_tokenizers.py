from __future__ import annotations

import json
import pathlib
import pickle
import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers as rust
from helpers.tower_oracles import ROOT

from bigalign.data.text import clip_text
from bigalign.data.text.tokenizers import TOKENIZERS, make_tokenizer

CLIP = "$BIGALIGN_DATA/tokenizers/clip_bpe_simple_vocab_16e6.txt.gz"
BERT = "$BIGALIGN_DATA/tokenizers/bert_base_uncased_vocab.txt"
PIECES = "$BIGALIGN_DATA/tokenizers/maxtext_default_32768.spm.model"


@pytest.fixture(scope="module")
def expected() -> dict:
  return json.loads((ROOT / "tokenize/expected.json").read_text())


@pytest.fixture
def vocabularies(request) -> dict[str, str]:
  """The vocabularies of the expected ids: next to them, or else the real ones."""
  names = dict(clip="clip_merges.txt.gz", wordpiece="wordpiece_vocabulary.txt")
  files = {name: ROOT / "tokenize" / file for name, file in names.items()}
  if all(file.is_file() for file in files.values()):
    return {name: str(file) for name, file in files.items()}
  request.getfixturevalue("data_root")
  return dict(clip=CLIP, wordpiece=BERT)


def test_bytes_and_their_mask():
  ids, mask = make_tokenizer("byte", length=5).encode_batch(["Ab", "", "é!", "abcdefgh", "abcd"])
  assert ids.dtype == np.int32 and mask.dtype == np.bool_
  assert ids.tolist() == [
    [68, 101, 2, 0, 0],
    [2, 0, 0, 0, 0],
    [198, 172, 36, 2, 0],
    [100, 101, 102, 103, 2],
    [100, 101, 102, 103, 2],
  ]
  np.testing.assert_array_equal(mask.sum(1), [3, 1, 4, 5, 5])
  lower = make_tokenizer("byte", length=5, lower=True)
  np.testing.assert_array_equal(lower.encode_batch(["AbÉ"])[0], lower.encode_batch(["abé"])[0])


def test_words_of_a_file(tmp_path):
  (tmp_path / "words.txt").write_text("latin\nsmall\nletter\ne\nlatin\n")
  tokenizer = make_tokenizer("words", length=6, vocabulary=str(tmp_path / "words.txt"))
  ids, mask = tokenizer.encode_batch(["LATIN small_letter é, e!", "", "e e e e e e e"])
  assert tokenizer.vocab_size == 7
  assert ids.tolist() == [[3, 4, 5, 1, 6, 2], [2, 0, 0, 0, 0, 0], [6, 6, 6, 6, 6, 2]]
  np.testing.assert_array_equal(mask, ids != 0)


@pytest.mark.parametrize(
  "name,options,wanted",
  [
    ("byte", {}, "A photo of a Café, letter b's unbelievable troll."),
    ("words", dict(vocabulary="photo letter b s"), "? photo ? ? ? letter b s ? ?"),
    (
      "sentencepiece",
      dict(path=PIECES, pad=0),
      "A photo of a Café, letter b's unbelievable troll.",
    ),
    ("wordpiece", dict(path=BERT), "a photo of a cafe, letter b ' s unbelievable troll."),
    ("clip", dict(path=CLIP), "a photo of a café , letter b 's unbelievable troll ."),
  ],
)
def test_ids_become_a_text_again(name, options, wanted, tmp_path, request):
  if "path" in options:
    request.getfixturevalue("data_root")
  if "vocabulary" in options:
    (tmp_path / "words.txt").write_text(options["vocabulary"])
    options = dict(vocabulary=str(tmp_path / "words.txt"))
  tokenizer = make_tokenizer(name, length=60, **options)
  ids, _ = tokenizer.encode_batch(["A photo of a Café, letter b's unbelievable troll."])
  assert tokenizer.decode(ids[0].tolist()) == wanted


def test_a_prompt_around_a_known_name_is_that_name(tmp_path):
  (tmp_path / "names.txt").write_text("cat\nfire\ntruck\n")
  tokenizer = make_tokenizer(
    "words", length=4, vocabulary=str(tmp_path / "names.txt"), drop_unknown=True
  )
  prompts = ["a photo of a fire truck.", "fire truck", "A blurry photo of the cat", "a photo"]
  ids, _ = tokenizer.encode_batch(prompts)
  assert ids.tolist() == [[4, 5, 2, 0], [4, 5, 2, 0], [3, 2, 0, 0], [2, 0, 0, 0]]


def test_the_vocabulary_of_glyphs_has_all_their_words():
  from bigalign.data.sources.base import open_source

  tokenizer = make_tokenizer("words", length=32, vocabulary="glyphs")
  source = open_source("glyphs")
  captions = [source[i]["captions"][0] for i in range(0, len(source), 997)]
  ids, _ = tokenizer.encode_batch(captions)
  assert (ids != 1).all() and ids.max() < tokenizer.vocab_size


@pytest.mark.parametrize(
  "name,options",
  [
    ("clip77", dict(length=77)),
    ("clip32", dict(length=32)),
    ("clip77_canonicalize", dict(length=77, canonicalize=True)),
    ("clip77_whitespace", dict(length=77, lower=False)),
  ],
)
def test_clip_oracle(vocabularies, expected, name, options):
  tokenizer = make_tokenizer("clip", path=vocabularies["clip"], **options)
  ids, mask = tokenizer.encode_batch(expected["texts"])
  np.testing.assert_array_equal(ids, expected[name])
  # The end is the largest id, and the last real token.
  assert (mask.sum(1) - 1 == ids.argmax(1)).all()


def test_clip_cleaning_oracle(expected):
  clean = [clip_text.clean(text) for text in expected["texts"]]
  assert clean == expected["clean_whitespace"]
  assert [text.lower() for text in clean] == expected["clean_lower"]
  assert [clip_text.canonicalize(text) for text in clean] == expected["clean_canonicalize"]


def test_wordpiece_oracle(vocabularies, expected):
  length = len(expected["minilm_ids"][0])
  tokenizer = make_tokenizer("wordpiece", length=length, path=vocabularies["wordpiece"])
  ids, mask = tokenizer.encode_batch(expected["texts"])
  np.testing.assert_array_equal(ids, expected["minilm_ids"])
  np.testing.assert_array_equal(mask, np.array(expected["minilm_mask"], bool))


def test_sentencepiece_ends_even_when_cut(data_root):
  tokenizer = make_tokenizer("sentencepiece", length=6, path=PIECES)
  texts = ["A dog.", "one two three four five six seven eight nine", ""]
  ids, mask = tokenizer.encode_batch(texts)
  model = sentencepiece.SentencePieceProcessor(
    model_file=str(data_root / "tokenizers/maxtext_default_32768.spm.model")
  )
  pieces = model.encode(texts[0])
  assert ids[0].tolist() == [*pieces, *[2] * (6 - len(pieces))]  # this model pads with its end
  assert ids[1].tolist() == [*model.encode(texts[1])[:5], 2]
  np.testing.assert_array_equal(mask.sum(1), [len(pieces) + 1, 6, 1])
  gemma = make_tokenizer("sentencepiece", length=6, path=PIECES, pad=0, eos=1)
  assert gemma.encode_batch([""])[0].tolist() == [[1, 0, 0, 0, 0, 0]]


def test_sentencepiece_canonicalize(data_root):
  plain = make_tokenizer("sentencepiece", length=8, path=PIECES)
  canonical = make_tokenizer("sentencepiece", length=8, path=PIECES, canonicalize=True)
  lower = make_tokenizer("sentencepiece", length=8, path=PIECES, lower=True)
  np.testing.assert_array_equal(
    canonical.encode_batch(["A  big_Dog!"])[0], plain.encode_batch(["a big dog"])[0]
  )
  np.testing.assert_array_equal(
    lower.encode_batch(["A Dog!"])[0], plain.encode_batch(["a dog!"])[0]
  )


@pytest.fixture
def tokenizer_json(tmp_path) -> str:
  model = rust.Tokenizer(
    rust.models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "<s>": 3, "</s>": 4}, unk_token="<unk>")
  )
  model.pre_tokenizer = rust.pre_tokenizers.Whitespace()
  model.post_processor = rust.processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 4)]
  )
  model.save(str(tmp_path / "tokenizer.json"))
  return str(tmp_path / "tokenizer.json")


def test_any_tokenizer_json(tokenizer_json):
  ids, mask = make_tokenizer("hf", length=4, path=tokenizer_json, pad=9).encode_batch(
    ["a", "a b a b a"]
  )
  assert ids.tolist() == [[3, 1, 4, 9], [3, 1, 2, 4]]
  assert mask.sum(1).tolist() == [3, 4]
  with pytest.raises(
    ValueError, match=r"defines no padding token\. Set config\.data\.tokenizer\.pad"
  ):
    make_tokenizer("hf", length=4, path=tokenizer_json)


def test_a_tokenizer_pickles_as_its_spec(tokenizer_json, data_root):
  every = [
    make_tokenizer("byte", length=9, lower=True),
    make_tokenizer("words", length=9, vocabulary="glyphs", drop_unknown=True),
    make_tokenizer("sentencepiece", length=9, path=PIECES, canonicalize=True),
    make_tokenizer("wordpiece", length=9, path=BERT),
    make_tokenizer("hf", length=9, path=tokenizer_json, pad=0),
    make_tokenizer("clip", length=9, path=CLIP, pad=49407),
  ]
  assert {tokenizer.spec["name"] for tokenizer in every} == set(TOKENIZERS)
  for tokenizer in every:
    data = pickle.dumps(tokenizer)
    assert len(data) < 500, "a vocabulary was pickled"
    again = make_tokenizer(**json.loads(json.dumps(tokenizer.spec)))
    for other in (pickle.loads(data), again):
      np.testing.assert_array_equal(
        other.encode_batch(["A small letter"])[0], tokenizer.encode_batch(["A small letter"])[0]
      )
    assert tokenizer.encode_batch([])[0].shape == (0, 9)


def test_errors_name_the_file_and_the_option(tmp_path, data_root, monkeypatch):
  (tmp_path / "bad.txt").write_text("hello\nworld\n")
  bad = str(tmp_path / "bad.txt")
  with pytest.raises(ValueError, match=r"Unknown tokenizer 'bytes'; known: \['byte', 'clip'"):
    make_tokenizer("bytes", length=8)
  with pytest.raises(ValueError, match="length=1"):
    make_tokenizer("byte", length=1)
  with pytest.raises(TypeError, match="loud"):
    make_tokenizer("byte", length=8, loud=True)
  with pytest.raises(FileNotFoundError, match=r"path='nowhere\.model': no such file"):
    make_tokenizer("sentencepiece", length=8, path="nowhere.model")
  with pytest.raises(ValueError, match=r"bad\.txt': not a SentencePiece model"):
    make_tokenizer("sentencepiece", length=8, path=bad)
  with pytest.raises(ValueError, match=r"bad\.txt.*lacks \['\[PAD\]', '\[UNK\]'"):
    make_tokenizer("wordpiece", length=8, path=bad)
  with pytest.raises(ValueError, match=r"bad\.txt': not a tokenizer.json"):
    make_tokenizer("hf", length=8, path=bad)
  with pytest.raises(ValueError, match=r"bad\.txt: not CLIP's list of merges"):
    make_tokenizer("clip", path=bad, length=8)
  monkeypatch.delenv("BIGALIGN_DATA")
  with pytest.raises(KeyError, match="BIGALIGN_DATA is not set"):
    make_tokenizer("wordpiece", length=8, path=BERT)


def test_clip_finds_the_vocabulary_of_open_clip_without_importing_it(
  tmp_path, data_root, monkeypatch
):
  package = tmp_path / "open_clip"
  package.mkdir()
  (package / "__init__.py").write_text("raise ImportError('needs torch')")
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, "open_clip", raising=False)
  with pytest.raises(FileNotFoundError, match="open_clip_torch"):
    make_tokenizer("clip", length=8)
  file = data_root / "tokenizers/clip_bpe_simple_vocab_16e6.txt.gz"
  (package / "bpe_simple_vocab_16e6.txt.gz").write_bytes(file.read_bytes())
  ids, _ = make_tokenizer("clip", length=8).encode_batch(["a photo of a cat."])
  assert ids.tolist() == [[49406, 320, 1125, 539, 320, 2368, 269, 49407]]


def changed_json(path: str, **changes: object) -> str:
  """The tokenizer.json with other values, as a path."""
  content = json.loads(pathlib.Path(path).read_text())
  for name, value in changes.items():
    content[name].update(value)
  pathlib.Path(path).write_text(json.dumps(content))
  return path


def test_a_panic_of_the_library_is_an_error_with_the_file(tokenizer_json):
  changed_json(tokenizer_json, post_processor=dict(special_tokens={}))
  with pytest.raises(ValueError, match=r"tokenizer\.json': it cannot encode a text: .*no entry"):
    make_tokenizer("hf", length=4, path=tokenizer_json, pad=0)


def test_a_text_at_which_the_library_fails_is_an_ordinary_error(tokenizer_json):
  made = make_tokenizer("hf", length=4, path=tokenizer_json, pad=0)
  made.model = PanickingModel()
  with pytest.raises(ValueError, match="cannot encode a text: no entry found"):
    made.encode_batch(["a"])


class PanickingModel:
  """Raises what the Rust library raises, which is not an Exception."""

  def encode_batch_fast(self, texts):
    raise type("PanicException", (BaseException,), {})("no entry found")


def test_a_vocabulary_without_unknown_and_an_empty_one_are_refused(tmp_path):
  path = str(tmp_path / "tokenizer.json")
  rust.Tokenizer(rust.models.Unigram([("a", 0.0), ("b", -1.0)], 0)).save(path)
  assert make_tokenizer("hf", length=4, path=path, pad=0).vocab_size == 2
  changed_json(path, model=dict(unk_id=None))
  with pytest.raises(ValueError, match=r"tokenizer\.json': it cannot encode .*`unk_id` is missing"):
    make_tokenizer("hf", length=4, path=path, pad=0)
  rust.Tokenizer(rust.models.WordLevel({}, unk_token="a")).save(path)
  with pytest.raises(ValueError, match=r"tokenizer\.json': the vocabulary is empty"):
    make_tokenizer("hf", length=4, path=path, pad=0)


@pytest.mark.parametrize(
  "name,content,refused",
  [
    ("tokenizer_config", dict(additional_special_tokens=3), False),
    ("tokenizer_config", dict(added_tokens_decoder={"²": dict(content="<x>")}), False),
    ("tokenizer_config", dict(added_tokens_decoder={"9" * 5000: dict(content="<x>")}), False),
    ("tokenizer_config", dict(pad_token="\ud83d"), True),
    ("added_tokens", {"\ud83d": 5}, True),
  ],
)
def test_files_next_to_a_tokenizer_are_refused_by_name(tokenizer_json, name, content, refused):
  file = pathlib.Path(tokenizer_json).with_name(f"{name}.json")
  file.write_text(json.dumps(content))
  if refused:
    with pytest.raises(ValueError, match=f"{file}: not a JSON object"):
      make_tokenizer("hf", length=4, path=tokenizer_json, pad=0)
  else:
    assert make_tokenizer("hf", length=4, path=tokenizer_json, pad=0).vocab_size == 5
