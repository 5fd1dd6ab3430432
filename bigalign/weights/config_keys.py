"""Keys of other projects' configs that no layout reads: harmless, of one value only, or refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bigalign import tree

# They do not change the outputs of a trained model, or say what another part of the code reads.
_HARMLESS = """
_name_or_path name_or_path model_type architectures transformers_version _commit_hash dtype
torch_dtype torchscript use_bfloat16 tokenizer_class processor_class finetuning_task problem_type
task_specific_params id2label label2id num_labels return_dict output_attentions
output_hidden_states output_scores return_dict_in_generate gradient_checkpointing use_cache
output_past attn_implementation _attn_implementation _attn_implementation_internal
_attn_implementation_autoset tie_word_embeddings tie_encoder_decoder
tf_legacy_loss chunk_size_feed_forward cross_attention_hidden_size initializer_range
initializer_factor logit_scale_init_value
sentence_transformers transformers.js_config license language

bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id diversity_penalty
do_sample early_stopping encoder_no_repeat_ngram_size eos_token_id
exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty
max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
pad_token_id prefix remove_invalid_values repetition_penalty sep_token_id suppress_tokens
temperature top_k top_p typical_p mask_token_id cls_token_id

attention_dropout hidden_dropout_prob attention_probs_dropout_prob dropout classifier_dropout
drop_path_rate hidden_dropout projection_dim encoder_stride
out_features out_indices stage_names reshape_hidden_states apply_layernorm
pos_embed_shift pos_embed_jitter pos_embed_rescale
directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
pooler_size_per_head max_text_length

patch_dropout output_tokens attn_pooler_queries attn_pooler_heads
timm_model_pretrained timm_drop timm_drop_path hf_model_pretrained hf_tokenizer_name
tokenizer_mode tokenizer_kwargs pad_id custom_text init_logit_scale init_logit_bias
"""
HARMLESS = frozenset(re.findall(r"\S+", _HARMLESS))

# {key: the values that our towers compute}
FIXED: dict[str, tuple[Any, ...]] = {
  "num_channels": (3,),
  "add_cross_attention": (False,),
  "is_decoder": (False,),
  "is_encoder_decoder": (False,),
  "pruned_heads": ({}, None, []),
  "quantization_config": (None,),
  "pooler_type": ("first_token_transform",),
  "position_embedding_type": ("absolute",),
  "relative_attention_num_buckets": (32,),
  "block_type": (None, "default"),
  "nonscalar_logit_scale": (False,),
  **dict.fromkeys(
    ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"),
    (False,),
  ),
}


def check(given: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
  """Raises ValueError, naming them, for keys that may change what the model computes.

  Args:
    given: a config of another project.
    known: the keys that its layout reads.
    where: the config's file and place.
  """
  problems = []
  for key, value in given.items():
    if key in known or key in HARMLESS:
      continue
    if key == "auto_map" and isinstance(value, Mapping):
      if not any(str(x).startswith("AutoModel") for x in value):
        continue
      problems.append("auto_map: the model is computed by code of its own")
    elif key == "pooler_output_size":
      if value not in (None, given.get("hidden_size", 768)):
        problems.append(f"pooler_output_size: {str(value)[:80]}; known: the width")
    elif key in FIXED:
      if value not in FIXED[key]:
        problems.append(f"{key}: {str(value)[:80]!r}; known: {FIXED[key][0]!r}")
    else:
      problems.append(f"{key}: {str(value)[:80]!r} is an unknown key")
  if problems:
    raise ValueError(
      f"{where}: {tree.shown(problems, sep='; ', width=300)}. A key that this version does not know"
      " may change what the model computes; if it does not, remove it from the file"
    )
