"""A run and its export, which other libraries' evaluations take."""

from __future__ import annotations

import pathlib

from helpers import made_runs, peer_sets, small_models, small_tokenizers

import bigalign
from bigalign.data.text.tokenizers import make_tokenizer

SIZE = dict(width=32, depth=2, heads=2, dtype="float32", scan=False)


def run_and_export(folder: pathlib.Path, count: int) -> dict[str, str]:
  """{"run": folder, "exported": folder} of a SigLIP with random weights; an export of Hugging Face.

  Args:
    folder: of both.
    count: of the images whose captions make the vocabulary.
  """
  texts = [text for _, captions in peer_sets.captioned(count) for text in captions]
  texts += [*peer_sets.names(), *peer_sets.TEMPLATES]
  pieces = small_tokenizers.write_pieces(folder / "pieces", texts, 300)
  # The name of a class is at the end of a prompt: if it were cut off, classes would be ties.
  tokenizer = dict(name="sentencepiece", path=str(pieces), length=32)
  vocab_size = make_tokenizer(**tokenizer).vocab_size
  values = made_runs.small(
    model=dict(small_models.siglip(SIZE, vocab_size=vocab_size, length=32), pixels="half"),
    loss=dict(siglip=dict(weight=1.0)),
  )
  values["data"] |= dict(tokenizer=tokenizer, resize="squash")
  params = made_runs.random_params(values)
  matrices = {path: 0.3 * x if x.ndim > 1 else x for path, x in params.items()}
  run = made_runs.write(folder / "run", values, matrices)
  exported = bigalign.load(run).save(folder / "exported", "hf")
  return {"run": run, "exported": str(exported)}
