"""Chooses the glyphs that are held out.

`python -m bigalign.data.sources.glyphs_heldout` writes the list again.
"""

from __future__ import annotations

import collections
import hashlib
import pathlib
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

from bigalign.data.sources.glyphs import FONTS, LIST, PROBES, Pen, alphabet, parts

COUNTS = dict(heldout=210, heldout_dev=90, seen=210)  # characters
# Two images are twins below this sum of squared differences, one pixel from black to white.
TWIN = 1.0


def choose() -> dict[str, list[int]]:
  """Chooses the characters of LIST.

  Candidates are the letters that Unicode decomposes into a letter and marks, that both PROBES
  draw, that have no twin, and whose parts train keeps: the bare letter, the letter with two other
  marks, and the marks on two other letters of the script. They are distributed to the splits in the
  order of a hash of their names, until each split has its COUNTS.

  Returns:
    {split: labels}.
  """
  letters = alphabet()
  names = letters.names
  pairs = {i: pair for i, name in enumerate(names) if (pair := parts(name))}
  by_letter = collections.Counter(letter for letter, _ in pairs.values())
  by_marks = collections.Counter((letter.split()[0], marks) for letter, marks in pairs.values())
  drawn = [set(letters.items[letters.items[:, 1] == FONTS.index(cut), 0]) for cut in PROBES]
  candidates = [
    i
    for i in pairs
    if unicodedata.decomposition(chr(letters.codes[i])) and i in drawn[0] and i in drawn[1]
  ]
  candidates = sorted(set(candidates) - twins(candidates), key=lambda i: _lot(names[i]))
  chosen: dict[str, list[int]] = {split: [] for split in COUNTS}
  for i in candidates:
    letter, marks = pairs[i]
    script = letter.split()[0]
    if min(by_letter[letter], by_marks[script, marks]) <= 2 or letter not in names:
      continue  # the counts include this one
    split = min(COUNTS, key=lambda name: len(chosen[name]) / COUNTS[name])  # all fill evenly
    if len(chosen[split]) == COUNTS[split]:
      break
    chosen[split].append(i)
    if split != "seen":
      by_letter[letter] -= 1
      by_marks[script, marks] -= 1
  return {split: sorted(labels) for split, labels in chosen.items()}


def _lot(name: str) -> str:
  """A random sort key that does not depend on the version of any library."""
  return hashlib.sha256(f"bigalign glyphs {name}".encode()).hexdigest()


def twins(labels: Sequence[int], size: int = 32) -> set[int]:
  """Returns the labels whose image looks like that of another character.

  Args:
    labels: of the characters to compare with all others.
    size: of the images, pixels per side.

  Returns:
    Labels whose image equals one of another character in any cut, or differs by less than TWIN in
    the same cut.
  """
  items, pen = alphabet().items, Pen(size)
  ink = np.stack([255 - pen.draw(cut, glyph).ravel() for _, cut, glyph in items.tolist()])
  owners = collections.defaultdict(set)
  for label, image in zip(items[:, 0].tolist(), ink):
    owners[image.tobytes()].add(label)
  similar = set().union(*(same for same in owners.values() if len(same) > 1))
  for cut in range(len(FONTS)):
    rows = np.flatnonzero(items[:, 1] == cut)
    own = rows[np.isin(items[rows, 0], labels)]
    x, y = (ink[i].astype(np.float32) / 255 for i in (own, rows))
    distances = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
    distances[items[own, 0][:, None] == items[rows, 0][None]] = np.inf  # the character itself
    similar |= set(items[own[distances.min(1) < TWIN], 0].tolist())
  return similar & set(labels)


def as_text(chosen: Mapping[str, Sequence[int]]) -> str:
  """Returns the text of LIST: a line per character with split, code point and name between tabs."""
  letters = alphabet()
  return "".join(
    f"{split}\tU+{letters.codes[i]:04X}\t{letters.names[i]}\n"
    for split, labels in chosen.items()
    for i in labels
  )


if __name__ == "__main__":
  path = pathlib.Path(__file__).with_name(LIST)
  path.write_text(as_text(choose()), "utf-8")
  print(path)
