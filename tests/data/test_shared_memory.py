"""Batches are equal before and after shared memory, with or without a free slot; none is leaked."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pathlib
import pickle
import random
import signal
import threading
import time

import numpy as np
import pytest

from bigalign.data.loader import shared_memory, workers

SHARED = pathlib.Path("/dev/shm")


class Counted:
  """Batch k has arrays of every kind; `image` is made in a slot, and is larger from `grown` on."""

  def __init__(self, grown=1 << 60):
    self._grown = grown

  def __len__(self):
    return 40

  def __getitem__(self, k):
    rng = np.random.default_rng(k)
    image = shared_memory.empty((5, 7, 3 if k < self._grown else 30), np.uint8)
    other = shared_memory.empty((2,), np.int16)  # the slot is reserved already
    image[...] = rng.integers(0, 256, image.shape, np.uint8)
    other[...] = k
    return dict(
      mask=rng.random((5, 3)) < 0.5,
      other=other,
      image=image,
      id=np.arange(k, k + 5),
      none=np.zeros((0, 4), np.float32),
      scalar=np.float32(k) * np.ones((), np.float32),
      turned=rng.random((4, 6)).T,
    )


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    assert found[name].dtype == x.dtype and np.array_equal(found[name], x), name
    assert found[name].flags.owndata and found[name].flags.writeable


def test_slots_are_used_in_turn_and_batches_without_one_go_through_grain():
  sender, receiver = shared_memory.Sender(Counted()), shared_memory.Receiver()
  sent = [sender[k] for k in range(shared_memory.SLOTS + 2)]
  assert [isinstance(x, shared_memory.SlotBatch) for x in sent] == [True] * shared_memory.SLOTS + [
    False
  ] * 2
  for k, packed in enumerate(sent):
    assert_same(receiver.unpack(packed), Counted()[k])
  again = sender[9]
  assert isinstance(again, shared_memory.SlotBatch) and again.number == shared_memory.SLOTS
  assert_same(receiver.unpack(again), Counted()[9])
  memory = again.memory
  receiver.close()
  assert not (SHARED / memory).exists()


def test_a_batch_that_is_too_large_goes_through_grain():
  sender, receiver = shared_memory.Sender(Counted(grown=1)), shared_memory.Receiver()
  assert isinstance(sender[0], shared_memory.SlotBatch) and not isinstance(
    sender[1], shared_memory.SlotBatch
  )
  assert_same(receiver.unpack(sender[0]), Counted()[0])
  receiver.close()


def test_without_room_no_memory_is_taken(monkeypatch):
  asked = []

  def full(descriptor, first, size):
    asked.append((pathlib.Path(f"/proc/self/fd/{descriptor}").resolve(), size))
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(shared_memory.os, "posix_fallocate", full)
  sender = shared_memory.Sender(Counted())
  assert_same(shared_memory.Receiver().unpack(sender[3]), Counted()[3])
  assert_same(shared_memory.Receiver().unpack(sender[4]), Counted()[4])
  assert len(asked) == 1 and not asked[0][0].exists(), "allocated once, and freed"


@pytest.mark.slow
@pytest.mark.parametrize("grown", [3, 1 << 60])
def test_workers_send_every_batch_once_in_order_and_leak_nothing(grown):
  with contextlib.closing(workers.iterate(Counted(grown), workers=2)) as batches:
    found = list(batches)
    used = [SHARED / name for name in batches._receiver._memories]
    assert len(used) == 2
  assert len(found) == 40
  for k, batch in enumerate(found):
    assert_same(batch, Counted(grown)[k])
  assert not [path for path in used if path.exists()]


def test_a_batch_that_fails_leaves_its_slot_to_the_next():
  class Failing(Counted):
    def __getitem__(self, k):
      if k == 1:
        shared_memory.empty((5, 7, 3), np.uint8)[...] = 7
        raise OSError("a disk that is full")
      return super().__getitem__(k)

  sender, receiver = shared_memory.Sender(Failing()), shared_memory.Receiver()
  first = sender[0]
  with pytest.raises(OSError, match="full"):
    sender[1]
  second = sender[2]
  for k, packed in ((0, first), (2, second)):
    assert_same(receiver.unpack(packed), Counted()[k])
  assert shared_memory.empty((2, 2), np.uint8).flags.owndata, "no batch is being made"
  receiver.close()


class Large(Counted):
  """Does not fit into the buffer of a pipe."""

  def __init__(self):
    super().__init__()
    self._names = bytes(1 << 20)


def test_what_goes_through_the_pipe_to_a_worker_fits_into_its_buffer():
  spool = workers._Spool(Large())
  sent = pickle.dumps(shared_memory.Sender(spool))
  assert len(sent) < 4096, "a worker that dies while it starts would be waited for"
  assert_same(shared_memory.Receiver().unpack(pickle.loads(sent)[3]), Counted()[3])
  spool.close()


def killed(delay, *, how, minimum):
  """The error of reading batches if a worker gets a signal `delay` seconds after it began."""

  def strike():
    while not multiprocessing.active_children():
      time.sleep(0.001)
    time.sleep(delay)
    os.kill(random.choice(multiprocessing.active_children()).pid, how)

  threading.Thread(target=strike, daemon=True).start()
  began = time.monotonic()
  with contextlib.closing(workers.iterate(Large(), workers=2)) as batches:
    with pytest.raises(RuntimeError, match=r"worker process .* was killed by SIGKILL"):
      for k, batch in enumerate(batches):
        assert_same(batch, Counted()[k])
        time.sleep(minimum)
    return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.05])
def test_a_worker_killed_while_it_starts_is_named(delay):
  assert killed(delay, how=signal.SIGKILL, minimum=0.0) < 60


@pytest.mark.slow
def test_workers_survive_a_sigterm_to_all_processes_while_they_start():
  """A preempted run saves after some more steps, for which it needs its workers."""
  batches = workers.iterate(Large(), workers=2)
  with contextlib.closing(batches):
    for child in multiprocessing.active_children():
      os.kill(child.pid, signal.SIGTERM)
    assert_same(next(batches), Counted()[0])
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_memory_that_something_removed_is_named_and_does_not_break_the_end():
  sender, receiver = shared_memory.Sender(Counted()), shared_memory.Receiver()
  packed = sender[0]
  receiver.unpack(packed)
  sender._memory.unlink()
  receiver.close()
  with pytest.raises(RuntimeError, match=f"{packed.memory} of a data worker is gone: .* /dev/shm"):
    receiver.unpack(packed)


def serve(connection, folder):
  """A run: sends a batch and the names of its memory for each message, until None."""
  workers.own_shared_memory(folder)
  with contextlib.closing(workers.iterate(Counted(), workers=1)) as batches:
    while connection.recv():
      batch = next(batches)
      connection.send((batch, [*batches._receiver._memories]))


class Served:
  """A run in a process of its own; `batch` returns its next batch and the files of its memory."""

  def __init__(self, folder):
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("spawn")
    self._connection, theirs = context.Pipe()
    self.process = context.Process(target=serve, args=(theirs, str(folder)))
    self.process.start()
    theirs.close()

  def batch(self):
    self._connection.send(True)
    batch, names = self._connection.recv()
    return batch, [SHARED / name for name in names]

  def close(self):
    self._connection.send(None)
    self.process.join(30)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="Linux only")
def test_the_death_of_a_run_takes_no_memory_of_another_of_the_same_parent(tmp_path):
  """The runs share the parent's resource tracker, which unlinks the memory of ended processes."""
  runs = [Served(tmp_path / name) for name in ("killed", "other")]
  (_, left), (first, mine) = [run.batch() for run in runs]
  assert_same(first, Counted()[0])
  assert left and mine and all(path.exists() for path in [*left, *mine])
  runs[0].process.kill()
  runs[0].process.join()
  again = Served(tmp_path / "killed")  # the same command once more
  again.batch()
  assert not [path for path in left if path.exists()], "a run frees what it left when it was killed"
  assert [path for path in mine if path.exists()] == mine
  for k in range(1, 12):  # each slot several times
    assert_same(runs[1].batch()[0], Counted()[k])
  for run in (again, runs[1]):
    run.close()
  assert not [path for path in mine if path.exists()] and runs[1].process.exitcode == 0


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_twenty_workers_killed_at_random_times_are_named():
  draw = random.Random(0)
  for _ in range(20):
    assert killed(draw.uniform(0, 8), how=signal.SIGKILL, minimum=0.5) < 60
