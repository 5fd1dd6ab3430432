"""The same samples in every format that can be read."""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

Records = Sequence[dict[str, Any]]  # image: bytes, captions: tuple[str, ...], label: int


def write_folder(root: pathlib.Path, records: Records) -> str:
  """Image files, and a .jsonl of open_clip's column names; captions are a list."""
  (root / "images").mkdir(parents=True)
  lines = []
  for i, record in enumerate(records):
    (root / f"images/{i}.jpg").write_bytes(record["image"])
    lines.append(
      json.dumps(dict(filepath=f"images/{i}.jpg", title=record["captions"], label=record["label"]))
    )
  (root / "data.jsonl").write_text("\n".join(lines))
  return f"{root}/data.jsonl"


def write_parquet(root: pathlib.Path, records: Records, *, files: int = 2, rows: int = 100) -> str:
  """Hugging Face's columns, `rows` to a row group."""
  root.mkdir(parents=True, exist_ok=True)
  image = pa.struct(dict(bytes=pa.binary(), path=pa.string()))
  schema = pa.schema(dict(image=image, captions=pa.list_(pa.string()), label=pa.int64()))
  each = -(-len(records) // files)
  for f in range(files):
    part = records[f * each : (f + 1) * each]
    table = pa.Table.from_pydict(
      dict(
        image=[dict(bytes=record["image"], path=f"{i}.jpg") for i, record in enumerate(part)],
        captions=[record["captions"] for record in part],
        label=[record["label"] for record in part],
      ),
      schema,
    )
    pq.write_table(table, root / f"{f}.parquet", row_group_size=rows)
  return f"{root}/*.parquet"


def example(**features: list) -> bytes:
  """A serialised tf.train.Example."""
  message = tf_example_pb2.Example()
  for name, values in features.items():
    kind = "bytes_list" if isinstance(values[0], bytes) else "int64_list"
    getattr(message.features.feature[name], kind).value.extend(values)
  return message.SerializeToString()


def write_array_record(path: pathlib.Path, data: Sequence[bytes]) -> str:
  path.parent.mkdir(parents=True, exist_ok=True)
  writer = ArrayRecordWriter(str(path), "group_size:1")
  for record in data:
    writer.write(record)
  writer.close()
  return str(path)


def write_array_records(root: pathlib.Path, records: Records) -> str:
  """Two files of examples."""
  for f, part in enumerate((records[: len(records) // 3], records[len(records) // 3 :])):
    write_array_record(
      root / f"{f}.array_record",
      [
        example(
          image=[record["image"]],
          label=[record["label"]],
          captions=[text.encode() for text in record["captions"]],
        )
        for record in part
      ],
    )
  return f"{root}/*.array_record"


def write_tfds(root: pathlib.Path, records: Records) -> str:
  """A prepared TFDS dataset in the order of the records; its name begins with "versions"."""

  class Versions(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    # For a builder in a package TFDS needs importlib_resources, which it does not install.
    __module__ = "versions"

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        disable_shuffling=True,
        features=tfds.features.FeaturesDict(
          dict(
            image=tfds.features.Image(encoding_format="jpeg"),
            label=tfds.features.ClassLabel(num_classes=10),
            captions=tfds.features.Sequence(tfds.features.Text()),
          )
        ),
      )

    def _split_generators(self, dl_manager):
      return dict(train=self._generate_examples())

    def _generate_examples(self):
      for i, record in enumerate(records):
        yield (
          i,
          dict(
            image=io.BytesIO(record["image"]),
            label=record["label"],
            captions=list(record["captions"]),
          ),
        )

  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(io.StringIO()):
    Versions(data_dir=str(root), file_format="array_record").download_and_prepare()
  return "tfds:versions:train"


VERSIONS = dict(
  folder=write_folder, parquet=write_parquet, array_record=write_array_records, tfds=write_tfds
)
