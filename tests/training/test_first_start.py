"""A start that failed before its first checkpoint does not claim the folder of the run."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import small_runs

from bigalign import train
from bigalign.checkpoint import Checkpoints
from bigalign.run import provenance
from bigalign.run.workdir import Workdir


def test_a_run_begins_with_its_first_checkpoint(tmp_path):
  folder = Workdir(tmp_path)
  assert train._record(folder) is None
  provenance.write_config(tmp_path, {"config": {"seed": 1}})
  assert train._record(folder) is None
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"clock": {"step": np.int32(1)}}, {}, {})
  assert train._record(folder)["config"] == {"seed": 1}


def test_a_damaged_record_without_a_checkpoint_is_no_obstacle(tmp_path):
  (tmp_path / "config.json").write_text("{")
  assert train._record(Workdir(tmp_path)) is None


@pytest.mark.slow
def test_another_config_begins_where_the_first_start_failed(tmp_path):
  """As for W&B that is not installed: config.json is written by then."""
  config = small_runs.config({"data": 8, "fsdp": 1, "tensor": 1}, total_steps=2)
  for seed in (0, 5):
    config.seed = seed
    train.setup(config, Workdir(tmp_path))
    assert provenance.read_config(tmp_path)["config"]["seed"] == seed
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"clock": {"step": np.int32(1)}}, {}, {})
  config.seed = 6
  with pytest.raises(ValueError, match=r"another config:\n  config.seed: was 5, now 6"):
    train.setup(config, Workdir(tmp_path))
