"""What all formats share: the trained model, its folder, and the record of a format."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from bigalign.data.loader.options import DataOptions
from bigalign.data.text.tokenizers import Tokenizer
from bigalign.export import tokenizer_files
from bigalign.model import DualEncoder
from bigalign.options import Component
from bigalign.projectors import PROJECTORS
from bigalign.towers import TOWERS
from bigalign.towers.bert import BertOptions
from bigalign.towers.features import FeaturesOptions

Arrays = dict[str, np.ndarray]
Reasons = dict[str, list[str]]  # {family: why it cannot hold the model}


class TrainedModel(NamedTuple):
  """A trained model, ready to be exported.

  Args:
    model: in float32.
    arrays: its parameters by path, "image_tower/…", and the scalars "t" (log of the logit scale,
      learned or fixed) and "b" (logit bias), if the loss has one.
    data: the data options of the run.
    tokenizer: the tokenizer of the run.
    heads: {"heads/<loss>/…": array} of the losses with layers of their own, if they are exported.
    losses: config.loss.
  """

  model: DualEncoder
  arrays: Arrays
  data: DataOptions
  tokenizer: Tokenizer
  heads: Mapping[str, np.ndarray] = {}
  losses: Mapping[str, Component] = {}

  @property
  def image(self) -> Any:
    """The options of the image tower."""
    return self.model.image_tower.options

  @property
  def text(self) -> Any:
    """The options of the text tower."""
    return self.model.text_tower.options

  @property
  def vector_shape(self) -> tuple[int, ...] | None:
    """(D,) or (1 + T, D) if texts are vectors from a store, else None."""
    return self.text.row_shape if isinstance(self.text, FeaturesOptions) else None

  @property
  def end_id(self) -> int:
    """The id with which the tokenizer ends every text."""
    ids, mask = self.tokenizer.encode_batch([""])
    return int(ids[mask][-1])

  def reads_end(self, text: Any) -> bool:
    """Whether a text tower with these options pools the token that ends every text."""
    if text.pool == "argmax":
      return self.end_id == self.tokenizer.vocab_size - 1
    return text.pool == "eos" and text.eos in (None, self.end_id)

  @property
  def padding_has_no_effect(self) -> bool:
    """Whether padding after the end of a text cannot change its embedding."""
    return getattr(self.text, "causal", False) and self.reads_end(self.text)

  @property
  def hides_padding(self) -> bool:
    """Whether attention of the text tower masks padding; BERT's always does."""
    return isinstance(self.text, BertOptions) or bool(self.text.mask_padding)

  def tokenizer_files(self) -> dict[str, Any]:
    """{name: JSON} of the files of the tokenizer.

    Raises:
      ValueError: for a tokenizer that these files cannot describe.
    """
    unseen = self.padding_has_no_effect
    mask = self.hides_padding and not unseen
    return tokenizer_files.files(self.tokenizer, padding_has_no_effect=unseen, mask=mask)


class Contents(NamedTuple):
  """The contents of a folder.

  Args:
    family: the class of models that the folder holds.
    tensors: {file of weights: function that returns its tensors}.
    files: {name: text, or JSON} of the other files.
    heads: names of the losses whose heads the weights of the family hold.
  """

  family: str
  tensors: Mapping[str, Callable[[], Arrays]]
  files: dict[str, Any]
  heads: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
  """A format of `bigalign export`.

  Args:
    name: the value of --format.
    prepare: returns the contents of the folder, or why the format cannot hold the model.
    compute: computes the outputs for N images and M texts from a folder, with the other library.
    packages: the packages that `compute` imports.
    heads: whether heads can be beside the weights, in a file of their own.
    output: what is compared: "logits" [N, M], or "embeddings" [M, E] if the folder holds the text
      side only.
    library: the library_name on the Hugging Face hub.
    tags: further tags on the hub.
    usage: returns the part of the model card that shows how to load the folder. Its code opens
      "DIR" and the image "x.jpg"; {padding} is a placeholder.
    on_hub: (old, new): how this code changes for the repository "REPO" of the hub.
  """

  name: str
  prepare: Callable[[TrainedModel], Contents | Reasons]
  compute: Callable[[pathlib.Path, Sequence[Image.Image], Sequence[str]], np.ndarray]
  packages: tuple[str, ...] = ()
  heads: bool = True
  output: str = "logits"
  library: str
  tags: tuple[str, ...] = ()
  usage: Callable[[TrainedModel], str]
  on_hub: tuple[str, str] = ('"DIR"', '"REPO"')


# `on_hub` for code that needs the files of a folder.
DOWNLOADED = (
  'folder = "DIR"',
  'from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("REPO")',
)


def tower_name(options: Any) -> str:
  """The name of a tower in the config, from its options."""
  return next(name for name, kind in TOWERS.items() if kind is type(options))


def projector_name(projector: Any) -> str:
  """The name of a projector in the config."""
  return next(name for name, kind in PROJECTORS.items() if kind is type(projector))


def requirement(key: str, ours: Any, *theirs: Any) -> str:
  """Why a format cannot hold a model: an option of the config has another value."""
  return f"{key} must be {' or '.join(map(repr, theirs))} (yours: {ours!r})"
