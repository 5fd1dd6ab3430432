"""Glyphs: characters of open fonts, drawn on demand and captioned with their Unicode names.

The dataset needs no download: matplotlib ships the fonts, FreeType draws them, Unicode names them.
glyphs_heldout.txt lists the characters that are held out; glyphs_heldout.py chooses them.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import importlib.util
import pathlib
import re
import struct
import threading
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import freetype
import numpy as np

from bigalign.data.files import lines
from bigalign.private_apis import rendered_glyph

# Font file -> the words of its cut. Listed one by one, because the folder also holds LastResort,
# which draws a box for every code point.
CUTS = {
  "DejaVuSans": "sans",
  "DejaVuSans-Bold": "bold sans",
  "DejaVuSans-Oblique": "oblique sans",
  "DejaVuSans-BoldOblique": "bold oblique sans",
  "DejaVuSansMono": "mono",
  "DejaVuSansMono-Bold": "bold mono",
  "DejaVuSansMono-Oblique": "oblique mono",
  "DejaVuSansMono-BoldOblique": "bold oblique mono",
  "DejaVuSerif": "serif",
  "DejaVuSerif-Bold": "bold serif",
  "DejaVuSerif-Italic": "italic serif",
  "DejaVuSerif-BoldItalic": "bold italic serif",
  "STIXGeneral": "stix",
  "STIXGeneralBol": "bold stix",
  "STIXGeneralItalic": "italic stix",
  "STIXGeneralBolIta": "bold italic stix",
}
FONTS = tuple(CUTS)  # the ordinal of a cut is its place in this tuple
# The two cuts that evaluation averages; every held-out character has both.
PROBES = ("DejaVuSans", "DejaVuSerif-Bold")
SPLITS = ("train", "heldout", "heldout_dev", "seen")
LIST = "glyphs_heldout.txt"
MARKED_SHARE = 0.6  # of the training samples are letters with marks

_MARKED = re.compile(r"((?:latin|greek|cyrillic) (?:small|capital) letter .+?) with (.+)")
# No hinting: only the outlines decide the pixels, not the version of FreeType's hinter.
_LOAD = freetype.FT_LOAD_NO_HINTING | freetype.FT_LOAD_NO_BITMAP

# FreeType forbids two threads in one font, and ctypes releases the GIL during a call.
_FREETYPE = threading.Lock()


class Alphabet(NamedTuple):
  """All characters that are drawn, and the cuts that have them."""

  codes: tuple[int, ...]  # [K] code points, ascending; the position is the label
  names: tuple[str, ...]  # [K] lower-case Unicode names, all distinct
  items: np.ndarray  # [M, 3] int32: label, cut (ordinal in CUTS), glyph index in the font


@functools.cache
def alphabet() -> Alphabet:
  """Returns the characters that have a Unicode name, and ink in at least one of CUTS.

  Names and decompositions never change, and the only nameless characters of these fonts are
  private ones and five gaps in the Hebrew presentation forms. So the list is the same for every
  version of unicodedata since Python 3.11.
  """
  drawn = []  # of each cut, [n, 3]: code point, cut, glyph
  for cut, stem in enumerate(FONTS):
    font = font_folder() / f"{stem}.ttf"
    codes, glyphs = np.asarray([*freetype.Face(str(font)).get_chars()], np.int32).T
    outlined = _outlined(font.read_bytes())[glyphs] & (glyphs > 0)
    drawn.append(np.stack([codes, np.full_like(codes, cut), glyphs], 1)[outlined])
  items = np.concatenate(drawn)
  # Separators and format controls draw nothing, or in some fonts a symbol of the control.
  skipped = ("Zs", "Zl", "Zp", "Cf", "Cc", "Co", "Cn")
  codes = np.asarray(
    [x for x in np.unique(items[:, 0]) if unicodedata.category(chr(x)) not in skipped]
  )
  items = items[np.isin(items[:, 0], codes)]
  items[:, 0] = np.searchsorted(codes, items[:, 0])
  return Alphabet(
    tuple(codes.tolist()),
    tuple(unicodedata.name(chr(code)).lower() for code in codes),
    items[np.lexsort(items.T[::-1])],
  )


def _outlined(font: bytes) -> np.ndarray:
  """[G] bool: which glyphs of a TrueType font have an outline.

  It is read from the table of their places, https://learn.microsoft.com/typography/opentype/spec/loca,
  because loading 55,000 glyphs one by one takes four times as long.
  """
  (count,) = struct.unpack_from(">H", font, 4)
  records = [struct.unpack_from(">4sIII", font, 12 + 16 * i) for i in range(count)]
  place = {tag: (begin, size) for tag, _, begin, size in records}
  begin, size = place[b"loca"]
  (is_long,) = struct.unpack_from(">h", font, place[b"head"][0] + 50)
  offsets = np.frombuffer(font[begin : begin + size], ">u4" if is_long else ">u2")
  return np.diff(offsets.astype(np.int64)) > 0


def font_folder() -> pathlib.Path:
  """Returns the folder of matplotlib's fonts, without importing matplotlib."""
  spec = importlib.util.find_spec("matplotlib")
  if spec is None or spec.origin is None:
    raise FileNotFoundError("glyphs draws the fonts that matplotlib ships; pip install matplotlib")
  return pathlib.Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"


def parts(name: str) -> tuple[str, str] | None:
  """Splits the name of a letter with marks; None for other characters.

  >>> parts("latin small letter e with acute")
  ('latin small letter e', 'acute')
  """
  match = _MARKED.fullmatch(name)
  return (match[1], match[2]) if match else None


def words(caption: str) -> list[str]:
  """Returns the words of a caption: sequences of letters and digits."""
  return re.findall(r"[a-z0-9]+", caption)


def vocabulary() -> tuple[str, ...]:
  """Returns all words that captions contain, sorted."""
  captions = [*alphabet().names, *CUTS.values()]
  return tuple(sorted({word for caption in captions for word in words(caption)}))


class Pen:
  """Draws glyphs with FreeType, all with the same size and baseline.

  Args:
    size: of the images, pixels per side.
  """

  def __init__(self, size: int):
    self.size = size
    self.em = 0.75 * size  # pixels per em
    self.baseline = round(0.75 * size)  # rows from the top
    self.faces: dict[int, Any] = {}

  def draw(self, cut: int, glyph: int) -> np.ndarray:
    """Returns [size, size] uint8, black on white, centred; glyphs that do not fit are reduced."""
    with _FREETYPE:
      ink, top = self._ink(cut, glyph)
    height, width = ink.shape
    y = min(max(self.baseline - top, 0), self.size - height)
    x = (self.size - width) // 2
    image = np.full((self.size, self.size), 255, np.uint8)
    np.subtract(255, ink, out=image[y : y + height, x : x + width])
    return image

  def _ink(self, cut: int, glyph: int) -> tuple[np.ndarray, int]:
    """The coverage [h, w] uint8, and the rows between its top and the baseline."""
    if cut not in self.faces:
      face = freetype.Face(str(font_folder() / f"{FONTS[cut]}.ttf"))
      face.set_char_size(round(64 * self.em))
      self.faces[cut] = face
    face = self.faces[cut]
    ink, top = _rasterise(face, glyph)
    room = self.size - 2
    if max(ink.shape) > room:
      face.set_char_size(int(64 * self.em * (room - 1) / max(ink.shape)))
      ink, top = _rasterise(face, glyph)
      face.set_char_size(round(64 * self.em))
    return ink, top


def _rasterise(face: Any, glyph: int) -> tuple[np.ndarray, int]:
  face.load_glyph(glyph, _LOAD | freetype.FT_LOAD_RENDER)
  return rendered_glyph(face)


class Glyphs:
  """The glyphs as a source: one record per character and cut.

  Args:
    split: "train": MARKED_SHARE of the samples are letters with marks, which are repeated for that.
      "heldout": characters of which train has no font, but has their parts. "heldout_dev": more of
      them, for tuning. "seen": characters of the same kind that train has, for comparison.
    size: of the images, pixels per side.
    cuts: names of font files, such as ("DejaVuSans",); all of CUTS by default.

  Raises:
    ValueError: for an unknown split or cut.

  Example:
    >>> glyphs = Glyphs("heldout", size=24)
    >>> glyphs[0]["key"], glyphs[0]["captions"], glyphs[0]["image"].shape
    ('U+00C0/DejaVuSans', ('latin capital letter a with grave, sans',), (24, 24, 3))
  """

  def __init__(self, split: str = "train", size: int = 32, cuts: Sequence[str] | None = None):
    if split not in SPLITS:
      raise ValueError(f"Unknown split of glyphs {split!r}; known: {', '.join(SPLITS)}")
    if unknown := set(cuts or ()) - set(CUTS):
      raise ValueError(f"Unknown cuts of glyphs {sorted(unknown)}; known: {', '.join(CUTS)}")
    letters = alphabet()
    self.split = split
    self.size = size
    self.classnames = letters.names
    self.codes = letters.codes
    self.items = _items(split, cuts)
    self._pen: Pen | None = None
    digest = hashlib.sha256(f"{split} {size} {cuts} {freetype.version()}".encode())
    digest.update("\n".join(letters.names).encode())
    digest.update(self.items.tobytes())
    for stem in CUTS:
      digest.update((font_folder() / f"{stem}.ttf").read_bytes())
    self.fingerprint = digest.hexdigest()[:16]

  def __len__(self) -> int:
    return len(self.items)

  def __getitem__(self, index: int) -> dict[str, Any]:
    label, cut, glyph = self.items[index].tolist()
    if self._pen is None:
      self._pen = Pen(self.size)
    ink = self._pen.draw(cut, glyph)
    stem = FONTS[cut]
    return dict(
      image=np.repeat(ink[:, :, None], 3, axis=2),
      captions=(f"{self.classnames[label]}, {CUTS[stem]}",),
      key=f"U+{self.codes[label]:04X}/{stem}",
      label=label,
    )

  def __repr__(self) -> str:
    return f"Glyphs({self.split!r})"

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | dict(_pen=None)  # handles of FreeType cannot be pickled


@functools.cache
def listed() -> dict[str, tuple[int, ...]]:
  """Returns {split: labels} of the list in LIST. Only labels of `seen` are also in train."""
  letters = alphabet()
  label = {code: i for i, code in enumerate(letters.codes)}
  text = importlib.resources.files("bigalign.data.sources").joinpath(LIST).read_text("utf-8")
  chosen: dict[str, list[int]] = {split: [] for split in SPLITS if split != "train"}
  for line in lines.split(text):
    split, code, name = line.split("\t")
    index = label.get(int(code.removeprefix("U+"), 16))
    if index is None or letters.names[index] != name:
      raise ValueError(
        f"{LIST} names {code} ({name}), which the fonts in {font_folder()} do not draw; "
        "install matplotlib's own fonts, or choose again:"
        " python -m bigalign.data.sources.glyphs_heldout"
      )
    chosen[split].append(index)
  return {split: tuple(labels) for split, labels in chosen.items()}


def _items(split: str, cuts: Sequence[str] | None) -> np.ndarray:
  """The rows of alphabet().items in a split, in order and with repetitions, [N, 3] int32."""
  letters, lists = alphabet(), listed()
  items = letters.items
  if cuts is not None:
    items = items[np.isin(items[:, 1], [FONTS.index(cut) for cut in cuts])]
  if split != "train":
    return items[np.isin(items[:, 0], lists[split])]
  items = items[~np.isin(items[:, 0], lists["heldout"] + lists["heldout_dev"])]
  marked = np.isin(items[:, 0], [i for i, name in enumerate(letters.names) if parts(name)])
  wanted = round((~marked).sum() * MARKED_SHARE / (1 - MARKED_SHARE))
  return np.concatenate([items[~marked], np.resize(items[marked], (wanted, 3))])
