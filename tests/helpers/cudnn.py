"""Tracing for NVIDIA GPUs on machines without one."""

from __future__ import annotations

import pytest

from bigalign.towers import attention

HOPPER = attention.Device("gpu", (9, 0))


@pytest.fixture
def on_a_gpu(monkeypatch):
  """Towers are traced as for a GPU, and jax takes cuDNN for installed."""
  monkeypatch.setattr(attention, "device", lambda: HOPPER)
  monkeypatch.setattr(
    "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91_900
  )
