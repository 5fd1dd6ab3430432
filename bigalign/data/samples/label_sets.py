"""The classes of a sample that may have several: KEY.npy of a multilabel dataset.

CLIP_benchmark writes an array of one number per class, 1 for each class that the image shows and 0
for all others.
"""

from __future__ import annotations

import io
import logging
import math

import numpy as np

from bigalign.tree import cut

logger = logging.getLogger(__name__)

MOST = 1_000_000  # classes


class LabelSets:
  """Reads the label sets of one source.

  As with labels, what cannot be read does not reject the sample. It counts as missing and is logged
  once for each source.

  Example:
    >>> file = io.BytesIO()
    >>> np.save(file, np.float32([0, 1, 1]))
    >>> LabelSets()(file.getvalue(), key="a").tolist()
    [False, True, True]
  """

  def __init__(self) -> None:
    self._warned = False

  def __call__(self, data: bytes | None, *, key: str) -> np.ndarray | None:
    """Returns [K] bool, whether the sample has each class.

    Args:
      data: the content of an .npy file; None if the sample has none.
      key: names the sample in the log.

    Returns:
      The classes; None if the file is missing or holds anything else.
    """
    if data is None:
      return None
    try:
      return read(data)
    except ValueError as error:
      if not self._warned:
        self._warned = True
        logger.warning(
          "%s.npy: %s. Samples with such labels are used as samples without labels; this is logged"
          " once",
          *(key, error),
        )
      return None


def read(data: bytes) -> np.ndarray:
  """Returns [K] bool from the content of an .npy file; reads no pickles.

  Raises:
    ValueError: for anything but a list of zeros and ones.
  """
  file = io.BytesIO(data)
  try:
    version = np.lib.format.read_magic(file)
    read_header = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, _, dtype = read_header(file)
  except Exception as error:  # numpy evaluates the header, which raises errors of many kinds
    raise ValueError(f"not an .npy file: {cut(str(error), 80)}") from None
  # The header may state any size, so it is compared with the bytes before an array is made.
  count = math.prod(shape)
  one_axis = max(shape, default=1) == count
  if dtype.kind not in "biuf" or not one_axis or not 0 < count <= MOST:
    raise ValueError(
      f"an array of {cut(str(dtype), 40)} and shape {cut(str(shape), 40)}; expected [K] numbers,"
      " one per class"
    )
  if len(data) - file.tell() != count * dtype.itemsize:
    raise ValueError(
      f"{len(data) - file.tell()} bytes for {count} numbers of {dtype.itemsize} bytes each"
    )
  values = np.frombuffer(data, dtype, count, file.tell())
  if not np.isin(values, (0, 1)).all():
    raise ValueError("numbers other than 0 and 1")
  has_class: np.ndarray = values == 1
  return has_class
