"""Runs in a bucket, on a local server with the interface of Google Cloud Storage."""

from __future__ import annotations

import importlib.util
import shutil

import jax
import numpy as np
import pytest
from helpers import gcs_server, small_runs

from bigalign import evaluate, train
from bigalign.checkpoint import Checkpoints
from bigalign.report import main as report
from bigalign.run import lock, preemption
from bigalign.run import workdir as workdir_module
from bigalign.run.metrics import read_metrics
from bigalign.run.workdir import Workdir

needs_gcsfs = pytest.mark.skipif(
  not importlib.util.find_spec("gcsfs"), reason="gcsfs is not installed: the extra gcs"
)


@pytest.fixture(scope="module")
def bucket():
  with pytest.MonkeyPatch.context() as patch:
    made = gcs_server.Bucket()
    for name, value in made.environment().items():
      patch.setenv(name, value)
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("BIGALIGN_RUNS", str(tmp_path / "cache"))
  return tmp_path / "cache"


def config():
  """configs/tiny.py made smaller still: six steps of a text tower that learns nothing."""
  return small_runs.config(
    dict(data=-1, fsdp=1, tensor=1),
    total_steps=6,
    batch_size=16,
    checkpoint_every=2,
    frozen="text_tower/",
  ).to_dict()


def rows(workdir):
  return [
    {k: x for k, x in row.items() if k in ("step", "train/loss", "train/samples_seen")}
    for row in read_metrics(workdir)
  ]


@needs_gcsfs
@pytest.mark.slow
def test_a_run_in_a_bucket_resumes_on_another_machine(bucket, cache, tmp_path, monkeypatch):
  """Stopped after step 3; the machine is lost with its files; one checkpoint is incomplete."""
  whole = train.train(config(), tmp_path / "whole")
  place = "gs://bucket/runs/one"
  with monkeypatch.context() as patch:
    patch.setattr(preemption.PreemptionListener, "should_stop", lambda self, step: step == 3)
    with pytest.raises(preemption.Preempted):
      train.train(config(), place)
  assert not list(tmp_path.glob("gs:*"))
  shutil.rmtree(cache)
  written = [name for name in bucket.writes if name.startswith("runs/one/checkpoints/3/")]
  assert written[-1].endswith("commit_success.txt")
  del bucket.objects[written[-1]]  # as if it had been lost a moment before
  with Checkpoints(place, read_only=True) as checkpoints:
    assert checkpoints.latest() == 2
  again = train.train(config(), place)
  home = Workdir(place, reader=True)
  home.download()
  assert rows(home.local) == rows(tmp_path / "whole")
  for path, x in whole.trainable.items():
    np.testing.assert_array_equal(x, again.trainable[path])
  run = evaluate.open_run(place)
  assert run.step == 6 and run.workdir == home.local
  with pytest.raises(FileNotFoundError, match=r"gs://bucket/runs/two holds no config.json"):
    evaluate.open_run("gs://bucket/runs/two")


@needs_gcsfs
@pytest.mark.slow
def test_two_hosts_write_one_run_into_a_bucket(bucket, cache, tmp_path):
  """Each writes its part of a checkpoint; another run resumes from the last complete one."""
  c = small_runs.config(dict(data=1, fsdp=8, tensor=1), total_steps=2, checkpoint_every=1)
  whole = train.train(c, tmp_path / "whole")
  place, file = "gs://bucket/runs/hosts", small_runs.write(tmp_path / "tiny.py", c)
  with small_runs.Run(tmp_path / "two", 2, f"--config={file}", "--workdir", place) as run:
    run.ends()
  parts = [name for name in bucket.objects if name.startswith("runs/hosts/checkpoints/2/")]
  assert all(any(f"ocdbt.process_{i}/" in name for name in parts) for i in (0, 1)), parts
  shutil.rmtree(cache)
  del bucket.objects[next(name for name in parts if name.endswith("commit_success.txt"))]
  again = train.train(c, place)
  home = Workdir(place, reader=True)
  home.download()
  losses = [[row["train/loss"] for row in rows(x)] for x in (home.local, tmp_path / "whole")]
  np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)
  for path, x in whole.trainable.items():
    np.testing.assert_allclose(x, again.trainable[path], rtol=0, atol=1e-4)


@needs_gcsfs
def test_the_local_folder_equals_the_bucket(bucket, cache):
  one = Workdir("gs://bucket/small/")
  one.download()
  (one.local / "tensorboard").mkdir()
  names = ("config.json", "rejected-00000.jsonl", "rejected-00001.jsonl", "tensorboard/events")
  for name in names:
    (one.local / name).write_text(name)
  one.upload(1)
  assert [x for x in bucket.objects if x.startswith("small")] == ["small/rejected-00001.jsonl"]
  one.upload(0)
  assert {x for x in bucket.objects if x.startswith("small")} == {f"small/{x}" for x in names}
  before = len(bucket.writes)
  one.upload(0)
  assert len(bucket.writes) == before
  (one.local / "config.json").write_text("changed and never put there")
  (one.local / "metrics.jsonl").write_text("neither")
  other = Workdir("gs://bucket/small")
  other.download()
  assert other.local == one.local and (one.local / "config.json").read_text() == "config.json"
  assert not (one.local / "metrics.jsonl").exists()


@needs_gcsfs
def test_copies_in_a_bucket_are_downloaded_once(bucket, cache):
  one = Workdir("gs://bucket/copied")
  name = "copies/tokenizer-0f/tokenizer.json"
  (one.local / name).parent.mkdir(parents=True)
  (one.local / name).write_text("{}")
  one.upload(0)
  other = Workdir("gs://bucket/copied", reader=True)
  other.download()
  assert (other.local / name).read_text() == "{}" and other.local != one.local
  bucket.objects[f"copied/{name}"] = gcs_server.Object(b"never replaced", 2)
  other.download()
  assert (other.local / name).read_text() == "{}"
  before = len(bucket.writes)
  other.upload(0)
  assert len(bucket.writes) == before


@needs_gcsfs
def test_a_report_in_a_bucket_outlives_the_next_reader(bucket, cache, monkeypatch):
  bucket.objects["paged/metrics.jsonl"] = gcs_server.Object(b'{"step": 3}\n', 1)
  home = Workdir("gs://bucket/paged", reader=True)
  home.download()
  opened = evaluate.Run(home.local, 3, None, {}, None, {}, {}, {}, str(home.root))
  assert opened.name == "paged" and opened.workdir.name != "paged"
  monkeypatch.setattr(report, "open_run", lambda workdir, step: opened)
  monkeypatch.setattr(report, "embed_pairs", lambda run: "none")
  monkeypatch.setattr(report, "segmented", lambda run: {})
  monkeypatch.setattr(report, "confused", lambda run: {})
  monkeypatch.setattr(report, "page", lambda *_: "<h1>paged</h1>")
  path = report.report("gs://bucket/paged")
  Workdir("gs://bucket/paged", reader=True).download()
  assert path.read_text() == "<h1>paged</h1>"
  assert bucket.objects["paged/report.html"].data == b"<h1>paged</h1>"


@needs_gcsfs
def test_what_another_machine_writes_later_is_seen(bucket, cache):
  """gcsfs remembers listings, with the sizes of files."""
  reader = Workdir("gs://bucket/watched", reader=True)
  for text in ("short", "a longer text"):
    bucket.objects["watched/metrics.jsonl"] = gcs_server.Object(text.encode(), len(text))
    reader.download()
    assert (reader.local / "metrics.jsonl").read_text() == text
  bucket.objects["watched/config.json"] = gcs_server.Object(b"{}", 1)
  reader.download()
  assert {path.name for path in reader.local.iterdir()} == {"config.json", "metrics.jsonl"}


@needs_gcsfs
def test_a_process_downloads_its_own_log_of_rejected_samples_only(bucket, cache, monkeypatch):
  for name in ("rejected-00000.jsonl", "rejected-00001.jsonl", "rejected-00002.jsonl", "x.json"):
    bucket.objects[f"logs/{name}"] = gcs_server.Object(b"{}", 1)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  one = Workdir("gs://bucket/logs")
  one.local.mkdir(parents=True)
  (one.local / "rejected-00002.jsonl").write_text("of a process that runs on this machine too")
  one.download()
  found = {path.name: path.read_text() for path in one.local.iterdir()}
  beside = {"rejected-00002.jsonl": "of a process that runs on this machine too"}
  assert found == {"rejected-00001.jsonl": "{}", "x.json": "{}", **beside}


@needs_gcsfs
def test_files_that_a_killed_process_left_are_not_uploaded(bucket, cache):
  one = Workdir("gs://bucket/left")
  one.download()
  for name in ("metrics.jsonl", "config.json.part", "metrics.jsonl.host-7.tmp"):
    (one.local / name).write_text(name)
  one.upload(0)
  assert [x for x in bucket.objects if x.startswith("left")] == ["left/metrics.jsonl"]


@needs_gcsfs
@pytest.mark.slow
def test_metrics_are_added_to_a_checkpoint_in_a_bucket(bucket):
  with Checkpoints("gs://bucket/runs/scores", best="score") as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, {"clock": {"step": np.int32(step)}}, {}, {})
    checkpoints._manager.wait_until_finished()
    checkpoints.add_scores(1, {"score": 0.5})
    assert checkpoints.find("best") == 1
  with Checkpoints("gs://bucket/runs/scores", best="score", read_only=True) as checkpoints:
    assert checkpoints.find("best") == 1
  names = [name for name in bucket.objects if name.startswith("runs/scores/checkpoints/1/metrics")]
  assert names == ["runs/scores/checkpoints/1/metrics/metrics"]


@pytest.mark.parametrize("process", [0, 1])
def test_no_process_goes_on_before_the_lock_is_held(tmp_path, monkeypatch, process):
  """`download` of process 1 would replace the files of a run that is writing."""
  at_barrier = []

  class Client:
    def wait_at_barrier(self, name, milliseconds):
      assert milliseconds > 1000 * lock.STALE
      at_barrier.append((name, (tmp_path / "lock").exists()))

  monkeypatch.setattr(workdir_module, "coordination_client", Client)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "process_index", lambda: process)
  with Workdir(tmp_path).locked():
    assert [held for _, held in at_barrier] == [process == 0]


def test_a_run_that_lost_its_folder_uploads_nothing(tmp_path, monkeypatch):
  folder = Workdir(tmp_path / "run")
  monkeypatch.setattr(Workdir, "upload", lambda *_: pytest.fail("uploaded"))
  with folder.locked(), pytest.raises(lock.WorkdirLost), train._uploading_at_the_end(folder):
    shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize(
  "address, message",
  [
    (
      "s3://bucket/run",
      r"s3://bucket/run: a run's folder \(--workdir\) is a local path, a mount, or gs",
    ),
    ("gs://bucket/run", r"needs gcsfs: pip install 'bigalign\[gcs\]'"),
  ],
)
def test_unusable_addresses_are_errors(address, message, monkeypatch):
  monkeypatch.setattr(workdir_module.importlib.util, "find_spec", lambda name: None)
  with pytest.raises((ValueError, ImportError), match=message):
    Workdir(address)


def test_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  folder = Workdir("~/runs/x")
  assert folder.local == folder.root == tmp_path / "runs/x"
