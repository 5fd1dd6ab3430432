"""The model card of an exported folder."""

from __future__ import annotations

import itertools
import json
from typing import Any

from bigalign.config import recorded_config
from bigalign.data.loader.options import DataOptions
from bigalign.evaluate import Run
from bigalign.export.check import READERS
from bigalign.export.fit import Subject, hides_padding, pads_unseen
from bigalign.export.formats import Files
from bigalign.options import plain
from bigalign.run.metrics import read_metrics
from bigalign.stages import split

_HF = """```python
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("DIR")
processor = AutoProcessor.from_pretrained("DIR", backend="pil")
inputs = processor(text=["a cat", "a dog"], images=Image.open("x.jpg"), padding="max_length",
                   truncation=True, return_tensors="pt")
logits = model(**inputs).logits_per_image
```

`backend="pil"`: where torchvision is installed transformers would resize with it, which gives
slightly other pixels than those of the run's evaluation.

`padding="max_length"`: {padding}
"""
_OPEN_CLIP = """```python
import open_clip
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:DIR")
tokenizer = open_clip.get_tokenizer("local-dir:DIR")
logits, _ = model.eval().get_logits(preprocess(Image.open("x.jpg"))[None], tokenizer(["a cat"]))
```
"""
_NPZ = """`model.npz` has big_vision's names for `two_towers`: `img/…`, `txt/…`, `t`, `b`.
big_vision and `bigalign.weights` read it; `tokenizer.json` is for the `tokenizers` library.
"""
_TORCH = """`model.py` is the model in PyTorch, to be read and changed. It needs torch,
safetensors, tokenizers and Pillow.

```python
from PIL import Image

from model import load

logits = load("DIR").logits([Image.open("x.jpg")], ["a cat", "a dog"])
```
"""
_SENTENCE = """```python
from sentence_transformers import SentenceTransformer

embeddings = SentenceTransformer("DIR").encode(["a cat", "a dog"])  # unit norm
```

It is the text side alone: the embeddings are compared with the run's own of images.
"""
_USE = {
  "hf": ("transformers", _HF),
  "open_clip": ("open_clip", _OPEN_CLIP),
  "npz": ("", _NPZ),
  "torch": ("", _TORCH),
  "sentence-transformers": ("sentence-transformers", _SENTENCE),
}


def facts(run: Run, kind: str, family: str, ema: bool) -> dict[str, Any]:
  """What bigalign.json tells of the run."""
  rows = [row for row in read_metrics(run.workdir) if row["step"] == run.step]
  measured = {k: x for row in rows for k, x in row.items() if k.startswith(("val/", "ema/"))}
  return {
    "format": kind,
    "family": family,
    "step": run.step,
    "ema": ema,
    **{k: run.meta[k] for k in ("samples_seen", "dataset_size", "data", "revision", "versions")},
    "metrics": measured,
    "config": plain(run.config),
  }


def _where(data: DataOptions) -> str:
  """The sources of config.data."""
  return ", ".join(f"`{name}`" for name in data.sources)


def _padding(data: DataOptions, it: Subject) -> str:
  """What is to know of the padding of texts."""
  if it.vectors:
    return ""
  return (
    "any padding will do, the end of a text is read and nothing sees what is behind it."
    if pads_unseen(it)
    else f"the model was trained on texts of exactly {data.text_length} tokens, padding"
    + (
      " hidden by the attention mask."
      if hides_padding(it)
      else " seen; an attention mask would change the embeddings."
    )
  )


def text(about: dict[str, Any], made: Files, it: Subject, license: str, found: float | None) -> str:
  """README.md, in the form that the Hugging Face hub reads."""
  library, use = _USE[about["format"]]
  config, prefix = recorded_config(about), "ema/" if about["ema"] else ""
  data = config.data
  what = READERS[about["format"]].what
  task, title = {
    "logits": ("zero-shot-image-classification", "An image-text dual encoder"),
    "embeddings": ("sentence-similarity", "The text side of an image-text dual encoder"),
  }[what]
  head = [f"license: {license}", f"pipeline_tag: {task}"]
  head += [f"library_name: {library}"] if library else []
  measured = {
    k.removeprefix("ema/"): x
    for k, x in about["metrics"].items()
    if k.startswith("ema/") == about["ema"]
  }
  stages = split(config, dataset_size=about["dataset_size"])
  sizes = [size for size, _ in itertools.groupby(stage.batch_size for stage in stages)]
  rows = [
    ("trained by", f"bigalign {about['revision']}"),
    ("model", made.family + (", averaged parameters" if prefix else "")),
    ("data", f"{_where(data)} ({about['dataset_size']:,} samples, {about['data']})"),
    ("loss", ", ".join(config.loss)),
    ("steps", f"{about['step']:,} of batch {', then '.join(f'{size:,}' for size in sizes)}"),
    ("samples seen", f"{about['samples_seen']:,}"),
    ("images", f"{data.image_size} pixels, {data.resize}"),
    (
      "texts",
      f"vectors, {it.vectors[-1]} wide, that another program makes"
      if it.vectors
      else f"{data.tokenizer.name}, {data.text_length} tokens",
    ),
    (
      what,
      "not compared"
      if found is None
      else f"differ from the run's by {found:.1e} of the largest at most",
    ),
  ]
  parts = [
    "---",
    *head,
    "---",
    "",
    f"# {title}",
    "",
    "| | |",
    "|---|---|",
    *(f"| {name} | {value} |" for name, value in rows),
    "",
    use.replace("DIR", "this folder").replace("{padding}", _padding(data, it)),
    "## Measured",
    "",
    *(
      ["| metric | value |", "|---|---|", *(f"| {k} | {x:.4g} |" for k, x in measured.items())]
      if measured
      else ["Nothing at this step."]
    ),
    "",
    "## Config",
    "",
    "```json",
    json.dumps(about["config"], indent=1),
    "```",
    "",
  ]
  return "\n".join(parts)
