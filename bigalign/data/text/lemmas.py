"""Lemmas of English nouns by rules: a small substitute for a dictionary."""

from __future__ import annotations

import functools

_PLURALS = """
men:man women:woman people:person children:child feet:foot teeth:tooth geese:goose mice:mouse
lice:louse oxen:ox knives:knife lives:life wives:wife leaves:leaf wolves:wolf loaves:loaf
shelves:shelf halves:half calves:calf scarves:scarf hooves:hoof thieves:thief elves:elf cacti:cactus
fungi:fungus buses:bus gases:gas lenses:lens ties:tie pies:pie movies:movie cookies:cookie
zombies:zombie hoodies:hoodie axes:axe shoes:shoe toes:toe canoes:canoe
"""
_IRREGULAR = dict(pair.split(":") for pair in _PLURALS.split())
# Singulars, and words without a singular.
_WITHOUT = """
bus gas lens canvas atlas glasses scissors trousers pants jeans shorts series species tennis chess
has was his this yes iris analysis basis news
"""
_KEPT = frozenset(_WITHOUT.split())


@functools.lru_cache(1 << 16)
def lemma(word: str) -> str:
  """The singular of an English noun in lower case; any other word as it is, in lower case.

  >>> [lemma(word) for word in ("Dogs", "cities", "boxes", "horses", "women", "grass", "bus")]
  ['dog', 'city', 'box', 'horse', 'woman', 'grass', 'bus']

  Args:
    word: without blanks.
  """
  low = word.lower()
  if low in _IRREGULAR:
    return _IRREGULAR[low]
  if low in _KEPT or len(low) < 4 or not low.endswith("s") or low.endswith(("ss", "us", "'s")):
    return low
  if low.endswith("ies"):
    return low[:-3] + "y"
  if low.endswith(("sses", "xes", "shes", "ches", "zzes", "oes")):
    return low[:-2]
  return low[:-1]
