"""Layouts of Hugging Face's BERT, RoBERTa, XLM-RoBERTa and MPNet."""

from __future__ import annotations

import functools
from typing import Any

from bigalign.weights import table
from bigalign.weights.clip import find_prefix
from bigalign.weights.layout import Layout, Shapes, activation, sizes
from bigalign.weights.table import Row

OURS = "text_tower/"
BLOCK = f"{OURS}encoder/block_{{}}/"
_BERT = (
  "attention.self.query",
  "attention.self.key",
  "attention.self.value",
  "attention.output.dense",
)
_MPNET = ("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o")
# Heads of the pretraining task, and buffers.
UNUSED = r"position_ids$|^(\w+\.)?embeddings\.token_type_ids$|^(cls|lm_head|classifier|dropout)\."


def _bert(
  skip_padding: bool,
  buckets: int,
  shapes: Shapes,
  where: str,
  prefix: str,
  *,
  vocab_size: int = 30522,
  hidden_size: int = 768,
  intermediate_size: int = 3072,
  num_hidden_layers: int = 12,
  num_attention_heads: int = 12,
  max_position_embeddings: int = 512,
  type_vocab_size: int = 2,
  hidden_act: str = "gelu",
  layer_norm_eps: float = 1e-12,
  pad_token_id: int | None = 0,
  position_embedding_type: str = "absolute",
  is_decoder: bool = False,
  **_: Any,
) -> Layout:
  """The layout of BertModel and its relatives; without a pooler, the first token is pooled.

  Args:
    skip_padding: whether positions count only real tokens (RoBERTa, MPNet).
    buckets: buckets of the distance between tokens (MPNet).
    shapes: what the file holds.
    where: the config's file, for errors.
    prefix: of all keys; "" to find it.
  """
  if position_embedding_type != "absolute":
    raise ValueError(f"position_embedding_type: {position_embedding_type!r}; known: 'absolute'")
  if is_decoder:
    raise ValueError("is_decoder: true; a text tower is an encoder")
  if buckets and pad_token_id != 1:  # MPNetModel counts positions from 1, whatever the config says
    raise ValueError(f"pad_token_id: {pad_token_id!r}; MPNet pads with 1")
  prefix = prefix or find_prefix(shapes, "bert.", "roberta.", "mpnet.")
  pad = pad_token_id or 0
  other, n = f"{prefix}encoder.layer.{{}}.", num_hidden_layers
  qkvo, first = (
    (_MPNET, "attention.LayerNorm") if buckets else (_BERT, "attention.output.LayerNorm")
  )
  pooled = f"{prefix}pooler.dense.weight" in shapes
  rows = [
    Row(f"{OURS}embedding", f"{prefix}embeddings.word_embeddings.weight"),
    Row(f"{OURS}positions", f"{prefix}embeddings.position_embeddings.weight"),
    *_norm(f"{OURS}ln_embedding", f"{prefix}embeddings.LayerNorm", shapes),
    *table.attention(f"{BLOCK}attn", other, qkvo, n),
    *_norm(f"{BLOCK}ln1", f"{other}{first}", shapes, n),
    *table.dense(f"{BLOCK}mlp/fc1", f"{other}intermediate.dense", n),
    *table.dense(f"{BLOCK}mlp/fc2", f"{other}output.dense", n),
    *_norm(f"{BLOCK}ln2", f"{other}output.LayerNorm", shapes, n),
  ]
  types = 0 if buckets else type_vocab_size
  if types:
    rows.append(Row(f"{OURS}types", f"{prefix}embeddings.token_type_embeddings.weight"))
  if buckets:
    rows.append(Row(f"{OURS}relative", f"{prefix}encoder.relative_attention_bias.weight"))
  if pooled:
    pooler = table.dense(f"{OURS}pooler", f"{prefix}pooler.dense")
    rows += [row._replace(optional=True) for row in pooler]
  length = max_position_embeddings - (pad + 1 if skip_padding else 0)
  options = dict(
    name="bert",
    vocab_size=vocab_size,
    length=length,
    types=types,
    pad=pad,
    skip_padding=skip_padding,
    buckets=buckets,
    pool="pooler" if pooled else "cls",
    activation=activation(hidden_act),
    epsilon=layer_norm_eps,
    **sizes(hidden_size, num_hidden_layers, num_attention_heads, intermediate_size),
  )
  return Layout({"text": options}, tuple(rows), UNUSED, data={"length": length})


def _norm(ours: str, theirs: str, shapes: Shapes, layers: int = 0) -> list[Row]:
  """A layer norm, whose parameters are gamma and beta in the oldest files."""
  if f"{theirs.format(0)}.gamma" not in shapes:
    return table.norm(ours, theirs, layers)
  names = {"/scale": (".gamma", ""), "/bias": (".beta", "")}
  return table.rows(ours, theirs, names, layers)


bert = functools.partial(_bert, False, 0)
roberta = functools.partial(_bert, True, 0, vocab_size=50265, pad_token_id=1)
# MPNet has 32 buckets, whatever the config says.
mpnet = functools.partial(_bert, True, 32, vocab_size=30527, pad_token_id=1)
