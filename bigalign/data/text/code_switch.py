"""Captions in which some words are replaced by translations: M3P, https://arxiv.org/abs/2006.02635.

A model that reads them learns words of other languages from pictures with captions in one language.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence

import numpy as np

from bigalign import checks
from bigalign.data.files import lines
from bigalign.data.files.patterns import expand_variables

_WORD = re.compile(r"\w+")
Dictionary = Mapping[str, Sequence[str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeSwitchOptions:
  """Replaces words of captions by translations, in training.

  Args:
    dictionary: a file of translations: "word<TAB>translation" in each line, a word as often as it
      has translations; or JSON, {word: [translation, ...]}. Words are compared in lower case.
    probability: with which a word that has translations is replaced, by one of them at random.
    captions: share of the captions in which words are replaced at all.
  """

  dictionary: str
  probability: float = 0.5
  captions: float = 1.0

  def __post_init__(self) -> None:
    where = "config.data.code_switch"
    checks.between(where, 0, 1, probability=self.probability, captions=self.captions)


def read_dictionary(path: str) -> Dictionary:
  """The translations in a file, by words in lower case.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: for a line without a tab, another kind of JSON, or no translation at all.
  """
  name = expand_variables(path, what="config.data.code_switch.dictionary")
  try:
    text = lines.read_text(name)
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f"config.data.code_switch.dictionary={path!r}: there is no such file"
    ) from error
  found: dict[str, list[str]] = {}
  if name.endswith(".json"):
    given = json.loads(text)
    texts = given.values() if isinstance(given, dict) else [None]
    if not all(isinstance(x, list) and all(isinstance(y, str) for y in x) for x in texts):
      raise ValueError(f"{name}: expected an object, {{word: [translation, ...]}}")
    for word, translations in given.items():
      found.setdefault(word.lower(), []).extend(translations)
  else:
    for number, line in enumerate(lines.split(text), 1):
      line = line.removeprefix("\ufeff")  # of concatenated files
      if not line.strip():
        continue
      word, tab, translation = line.partition("\t")
      if not tab or not word.strip() or not translation.strip():
        raise ValueError(f"{name}: line {number} is not 'word<TAB>translation': {line[:80]!r}")
      found.setdefault(word.strip().lower(), []).append(translation.strip())
  if not any(found.values()):
    raise ValueError(f"{name}: no translation in this file")
  return {word: tuple(dict.fromkeys(x)) for word, x in found.items() if x}


class CodeSwitch:
  """Replaces words of texts.

  >>> import tempfile
  >>> with tempfile.NamedTemporaryFile("w", suffix=".tsv") as file:
  ...   _ = file.write("dog\\tHund\\n")
  ...   file.flush()
  ...   switch = CodeSwitch(CodeSwitchOptions(dictionary=file.name, probability=1.0))
  >>> switch("A dog, two dogs", np.random.default_rng(0))
  'A Hund, two dogs'

  Args:
    options: which file, and how often.
  """

  def __init__(self, options: CodeSwitchOptions):
    self._options = options
    self._dictionary = read_dictionary(options.dictionary)

  def __call__(self, text: str, rng: np.random.Generator) -> str:
    """A text with some words replaced; `rng` draws which ones, and by what."""
    if rng.random() >= self._options.captions:
      return text

    def replaced(match: re.Match[str]) -> str:
      translations = self._dictionary.get(match[0].lower())
      if translations is None or rng.random() >= self._options.probability:
        return match[0]
      return translations[int(rng.integers(len(translations)))]

    return _WORD.sub(replaced, text)
