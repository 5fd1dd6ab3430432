"""Captions of images by a head of a run: `bigalign.load(RUN).caption(images)`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigalign import tree
from bigalign.config import Config
from bigalign.data.text.tokenizers import Tokenizer
from bigalign.losses import make_loss
from bigalign.losses.heads.base import Head, Read, not_read
from bigalign.losses.heads.caption_decoder import begin, read_on
from bigalign.losses.heads.caption_search import Found, search
from bigalign.model import DualEncoder
from bigalign.program import sizes_of_towers
from bigalign.towers.base import Places, TowerOutput

BEAMS = 4  # of the captions in a report


class Written(NamedTuple):
  """The captions of an image: of greedy search, and of a search with BEAMS beams."""

  greedy: str
  beams: str


@dataclasses.dataclass(frozen=True)
class Captioner:
  """Writes captions.

  Args:
    name: of the loss whose head writes them.
    head: the head.
    model: the dual encoder.
    sizes: as for Loss.init.
    tokenizer: of the texts.
  """

  name: str
  head: Head
  model: DualEncoder
  sizes: Mapping[str, Any]
  tokenizer: Tokenizer

  def ids(
    self,
    params: Mapping[str, jax.Array],
    images: jax.Array,
    *,
    beams: int = 1,
    length_penalty: float = 1.0,
  ) -> jax.Array:
    """[B, L] int32, the captions of images as token ids; to be compiled. See `found`."""
    return self.found(params, images, beams=beams, length_penalty=length_penalty).ids

  def found(
    self,
    params: Mapping[str, jax.Array],
    images: jax.Array,
    *,
    beams: int = 1,
    length_penalty: float = 1.0,
  ) -> Found:
    """The captions of images and their log probabilities; to be compiled.

    The image tower runs once. The decoder reads each token once and keeps its keys and values.

    Args:
      params: {path: array} of the run, "model/…" and "heads/…".
      images: [B, S, S, 3] uint8.
      beams: 1 is greedy search.
      length_penalty: as of caption_search.search.
    """
    variables = {"params": tree.unflatten(tree.subtree(params, "model/"))}
    own = tree.unflatten(tree.subtree(params, f"heads/{self.name}/"))
    length = self.tokenizer.length

    def call(method: str, *args: Any) -> Any:
      return self.model.apply(variables, *args, method=method)

    def text_steps(ids: jax.Array, position: jax.Array, cache: Any = None) -> tuple[jax.Array, Any]:
      args = self.model, variables["params"]
      text = ids[:, None], Places(position, length)
      if cache is None:
        _, cache = begin(*args, *text, method=_text_tower)
      output, cache = read_on(*args, ({}, cache), *text, method=_text_tower)
      return output.tokens[:, 0], cache

    tokens = jnp.repeat(call("image_output", images).tokens, beams, axis=0)
    mask = jnp.ones((len(tokens), length), bool)
    ids = jnp.zeros(mask.shape, jnp.int32)
    shapes: TowerOutput = jax.eval_shape(functools.partial(call, "text_output"), ids, mask)
    # Heads that write read the shapes of these alone: a text is not known yet.
    batch = {"text": ids, "text_mask": mask}
    features = {"tokens_img": tokens, "tokens_txt": jnp.zeros(shapes.tokens.shape, tokens.dtype)}
    read = Read(batch, features, not_read, not_read, not_read, self.sizes, text_steps=text_steps)
    assert self.head.write is not None, "of_config has checked it"
    tokenizer = self.tokenizer
    return search(
      self.head.write(own, read),
      batch=len(images),
      length=length,
      beams=beams,
      prompt=self._prompt,
      end=tokenizer.last_id if tokenizer.adds_end else None,
      length_penalty=length_penalty,
    )

  def texts(self, ids: np.ndarray) -> list[str]:
    """[N, L] ids -> N texts, without the prompt and what follows the end token."""
    start = len(self._prompt) if self.head.prompt else 0
    end = self.tokenizer.last_id if self.tokenizer.adds_end else None
    texts = [self.tokenizer.decode(_until(row[start:], end)) for row in ids.tolist()]
    return [text.lstrip() for text in texts] if start else texts

  @property
  def _prompt(self) -> Sequence[int]:
    """The ids with which each text begins."""
    tokenizer = self.tokenizer
    if not self.head.prompt:
      return [tokenizer.first_id] if tokenizer.adds_start else []
    ids, mask = tokenizer.encode_batch([self.head.prompt])
    written: list[int] = ids[mask].tolist()
    return written[:-1] if tokenizer.adds_end else written


def _until(ids: Sequence[int], end: int | None) -> Sequence[int]:
  """The ids before the first `end`."""
  return ids[: ids.index(end)] if end in ids else ids


def _text_tower(model: DualEncoder, ids: jax.Array, places: Places) -> TowerOutput:
  """[B, N] ids at some places -> the output of the text tower."""
  output: TowerOutput = model.text_tower(ids, places=places)
  return output


def of_config(config: Config, model: DualEncoder, tokenizer: Tokenizer | None) -> Captioner:
  """What writes the captions of a run.

  Args:
    config: of the run.
    model: its dual encoder, possibly with towers that compute in another dtype.
    tokenizer: of its texts.

  Raises:
    ValueError: if no loss of the config has a head that writes texts.
  """
  term = term_that_writes(config)
  if term is None or tokenizer is None:
    raise ValueError(
      f"config.loss={[*config.loss]} has no term that writes captions; these do: caption, coca, and"
      " caption_fused without second"
    )
  return Captioner(*term, model, sizes_of_towers(config), tokenizer)


def term_that_writes(config: Config) -> tuple[str, Head] | None:
  """(name of the loss, its head) of the first loss whose head writes texts; None without one."""
  for name, (_, loss) in make_loss(config.loss).terms.items():
    if loss.head is not None and loss.head.write is not None:
      return name, loss.head
  return None


def of_run(config: Config, params: Mapping[str, Any], images: np.ndarray) -> list[Written]:
  """The captions of a few images [N, S, S, 3] uint8; none of a run that writes none.

  Args:
    config: of the run.
    params: {path: array} of the run.
    images: as the model sees them.
  """
  if term_that_writes(config) is None:
    return []
  captioner = of_config(config, config.model.build(), config.data.make_tokenizer())

  @jax.jit
  def both(params: Mapping[str, Any], images: jax.Array) -> tuple[jax.Array, jax.Array]:
    return captioner.ids(params, images), captioner.ids(params, images, beams=BEAMS)

  greedy, beams = (captioner.texts(np.asarray(ids)) for ids in both(params, jnp.asarray(images)))
  return [Written(*texts) for texts in zip(greedy, beams)]
