"""Random access to TFDS datasets that were prepared as array_record, without TensorFlow."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from bigalign import tree
from bigalign.data.samples import columns
from bigalign.data.samples.labels import Labels

# TFDS 4.9.10 also writes Parquet, but then loses every other slice of records.
_FORMAT = "array_record"
_CAPTIONS = ("caption", "captions", "captions.text", "text")


class Tfds:
  """Random access to a split of a prepared TFDS dataset.

  Nothing is downloaded, because each host of a run would download it again.

  Args:
    name: dataset and split, such as "cifar10:train" or "coco:1.1.0:train[:10%]".
    image: the feature that holds the image.
    captions: features in order of preference, "captions.text" for a nested one. By default caption,
      captions or text; if none of them exists, the name of the label.
    label: the feature that holds the class, if it exists.
    data_dir: where the dataset was prepared; None for TFDS's own default.
    images: whether images are read; if not, samples need none, and a record has image=b"".

  Raises:
    ValueError: if the name has no split, TFDS does not know the dataset, it is prepared in another
      format, or a feature is missing.
    FileNotFoundError: if the dataset is not prepared; gives the command.

  Example:
    tfds:cifar10:train opens Tfds("cifar10:train"), after
    tensorflow_datasets.builder("cifar10", file_format="array_record").download_and_prepare().
  """

  def __init__(
    self,
    name: str,
    *,
    image: str = "image",
    captions: Sequence[str] | None = None,
    label: str = "label",
    data_dir: str | None = None,
    images: bool = True,
  ):
    match = re.fullmatch(r"([^:]+(?::[\d*]+\.[\d*]+\.[\d*]+)?):(.+)", name)
    if not match:
      raise ValueError(f"'tfds:{name}' names no split; write it like tfds:cifar10:train")
    self.name, self.split = match[1], match[2]
    self.data_dir = data_dir
    self._image, self._label = image if images else "", label
    self._data: Any = None
    builder = self._builder()
    features = builder.info.features
    self._check(features, captions)
    info = builder.info.splits[self.split]
    self._size: int = info.num_examples
    # A FeaturesDict is not a dict: it has no get.
    classes = features[label] if label in features else None  # noqa: SIM401
    self.classnames = tuple(getattr(classes, "names", None) or ())
    self.labels = Labels(self.classnames, what=label)
    self._has_label = hasattr(classes, "num_classes")
    self._captions = (
      tuple(captions)
      if captions is not None
      else tuple(path for path in _CAPTIONS if path.partition(".")[0] in features)
    )
    self.fingerprint = hashlib.sha256(
      json.dumps(
        [builder.info.full_name, self.split, self._size, sorted(features)]
        + [
          [split, list(builder.info.splits[split].shard_lengths)]
          for split in sorted(builder.info.splits)
        ]
      ).encode()
    ).hexdigest()[:32]

  def __repr__(self) -> str:
    return f"Tfds({self.name}:{self.split})"

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, i: int) -> dict[str, Any]:
    if self._data is None:
      self._data = self._open()
    example = self._data[i]
    label = self.labels(example[self._label], key=self.key(i)) if self._has_label else -1
    texts = columns.texts(example, self._captions)
    if not self._captions and self.classnames and label >= 0:
      texts["captions"] = (self.classnames[label].replace("_", " "),)
    image = example[self._image] if self._image else b""
    return dict(image=image, label=label, **texts, key=self.key(i))

  def key(self, i: int) -> str:
    """Returns the key of sample i."""
    return f"{self.name}:{self.split}/{i}"

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_data": None}  # each process opens the files for itself

  def _builder(self) -> Any:
    # Takes half a second to import, and only this source needs it.
    import tensorflow_datasets as tfds

    try:
      builder = tfds.builder(self.name, data_dir=self.data_dir)
    except tfds.core.DatasetNotFoundError as error:
      raise ValueError(
        f"TFDS does not know {self.name!r}, and it is not prepared in data_dir={self.data_dir!r}"
      ) from error
    if not builder.is_prepared():
      raise FileNotFoundError(
        f"tfds:{self.name} is not prepared in {builder.data_dir}; prepare it once (this "
        f'downloads it): python -c "import tensorflow_datasets as t; '
        f"t.builder('{self.name}', data_dir={self.data_dir!r}, file_format='{_FORMAT}')"
        '.download_and_prepare()"'
      )
    formats = {kind.value for kind in builder.info.available_file_formats()}
    if _FORMAT not in formats:
      raise ValueError(
        f"tfds:{self.name} in {builder.data_dir} is prepared as {sorted(formats)}; "
        f"random access needs file_format={_FORMAT!r}, in a data_dir of its own"
      )
    return builder

  def _open(self) -> Any:
    import tensorflow_datasets as tfds

    decoders = {self._image: tfds.decode.SkipDecoding()} if self._image else None
    return self._builder().as_data_source(self.split, decoders=decoders, file_format=_FORMAT)

  def _check(self, features: Any, captions: Sequence[str] | None) -> None:
    """Raises ValueError if a feature is missing."""
    needed = [*([self._image] if self._image else []), *(captions or ())]
    absent = [path for path in needed if not _has(features, path)]
    if absent:
      raise ValueError(
        f"tfds:{self.name} has no feature {tree.shown(absent)}; it has"
        f" {tree.shown(sorted(features))}. Set config.data.source_options=dict(image=...) and"
        " config.data.captions to the ones that hold them (command line tools: --source_options"
        " image=... --captions ...)."
      )


def _has(features: Any, path: str) -> bool:
  """Whether a FeaturesDict has a feature, "a.b" for b in a or in each element of a sequence a."""
  first, _, rest = (path, "", "") if path in features else path.partition(".")
  if first not in features:
    return False
  inner = getattr(features[first], "feature", features[first])
  return not rest or (hasattr(inner, "keys") and _has(inner, rest))
