"""Uploads to a stand-in of the Hugging Face hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import hub_server
from helpers.small_models import CLIP, CLIP_LOSS, make_run, word_pieces
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from bigalign.export import check, main, push

# huggingface_hub 2.4 gives httpx2 the bytes of a file by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def server():
  made = hub_server.Hub()
  yield made
  made.shutdown()
  made.server_close()


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
  """The server, empty; huggingface_hub sends all requests there, with its token."""
  monkeypatch.setattr(constants, "ENDPOINT", server.url)
  monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
  monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
  for name in ("HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
  server.repos, server.blobs, server.asked, server.answers = {}, {}, [], {}
  server.role = "write"
  return server


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """A folder of the format hf, written without torch."""
  root = tmp_path_factory.mktemp("pushed")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(check, "missing", lambda kind: ["torch"])
    patch.setattr(main, "logits", lambda *given: np.zeros((4, 9)))  # compiling takes seconds
    run = make_run(root, CLIP, CLIP_LOSS, word_pieces(root))
    return main.export(run, "hf", root / "folder", license="mit")[0]


@pytest.fixture
def verified(monkeypatch):
  """The comparison of a folder costs nothing, and says that it is the run's."""
  monkeypatch.setattr(check, "difference", lambda folder: 1e-7)


def test_a_folder_becomes_one_commit(hub, exported, capfd):
  address = push.push(exported, "user/clip")
  repo = hub.repos["user/clip"]
  assert address == f"{hub.url}/user/clip" and not repo["private"]
  assert repo["commits"] == ["run, step 3, exported by bigalign"]
  names = sorted(x.relative_to(exported).as_posix() for x in exported.rglob("*") if x.is_file())
  assert sorted(repo["files"]) == names and len(hub.blobs) == 2
  for name in names:
    if name not in ("README.md", "bigalign.json"):
      assert repo["files"][name] == (exported / name).read_bytes()
  about = json.loads((exported / "bigalign.json").read_text())
  assert about["config"]["data"]["tokenizer"]["path"] == f"{exported.parent}/vocab.txt"
  about["config"]["data"]["tokenizer"]["path"] = "vocab.txt"
  assert json.loads(repo["files"]["bigalign.json"]) == about
  assert not any(str(exported.parent).encode() in x for x in repo["files"].values())
  card = repo["files"]["README.md"].decode()
  assert 'AutoModel.from_pretrained("user/clip")' in card and "DIR" not in card
  assert '"DIR"' in (exported / "README.md").read_text(), "the folder itself does not change"
  assert hub_server.TOKEN not in "".join(capfd.readouterr())


def test_nothing_hidden_is_uploaded(hub, exported, tmp_path):
  """The settings of git can hold a token."""
  copy = shutil.copytree(exported, tmp_path / "copy")
  names = {x.relative_to(copy).as_posix() for x in copy.rglob("*") if x.is_file()}
  for name in (".git/config", ".cache/a/b", "sub/.env", "sub/.ssh/id", ".hidden"):
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_text("url = https://user:secret@host")
  push.push(copy, "user/clip")
  assert hub.repos["user/clip"]["files"].keys() == names


def test_a_folder_that_states_less_is_uploaded_or_refused_before(hub, exported, tmp_path):
  """A converted model has no step; older folders have no name."""
  copy = shutil.copytree(exported, tmp_path / "older")
  about = json.loads((copy / "bigalign.json").read_text())
  less = {key: value for key, value in about.items() if key not in ("step", "name")}
  (copy / "bigalign.json").write_text(json.dumps(less))
  push.push(copy, "user/clip")
  assert hub.repos["user/clip"]["commits"] == ["older, exported by bigalign"]
  (copy / "bigalign.json").write_text(json.dumps({**less, "format": "other"}))
  with pytest.raises(ValueError, match=r"bigalign\.json: format: unknown 'other'"):
    push.push(copy, "user/never")
  assert "user/never" not in hub.repos


def test_an_upload_again_changes_the_same_repository(hub, exported):
  hub.repos["user/clip"] = {"private": False, "files": {"extra.txt": b"mine"}, "commits": ["first"]}
  push.push(exported, "clip")  # of the account that is logged in
  repo = hub.repos["user/clip"]
  assert len(repo["commits"]) == 2 and repo["files"]["extra.txt"] == b"mine"


def test_private_repositories(hub, exported):
  push.push(exported, "user/mine", private=True)
  assert hub.repos["user/mine"]["private"] and len(hub.repos["user/mine"]["commits"]) == 1
  hub.repos["user/open"] = {"private": False, "files": {}, "commits": []}
  with pytest.raises(ValueError, match=r"--private: .*/user/open exists and is public"):
    push.push(exported, "user/open", private=True)
  assert not hub.repos["user/open"]["files"], "nothing becomes public by accident"


def refused(capfd, *words):
  """What the program prints when it exits with status 1."""
  with pytest.raises(SystemExit) as left:
    main.main([*map(str, words)])
  shown = capfd.readouterr()
  assert left.value.code == 1 and hub_server.TOKEN not in shown.out + shown.err
  message = shown.err[shown.err.index("bigalign export:") :]  # after huggingface_hub's bars
  assert "Traceback" not in shown.err and len(message.splitlines()) <= 4
  return message


def test_what_is_wrong_with_the_login_is_said_first(hub, capfd, monkeypatch):
  """Before the run is opened: it does not exist."""
  words = ("nowhere", "--format=npz", "--out=nowhere", "--push=user/clip")
  hub.role = "read"
  assert "the token of user can only read" in refused(capfd, *words)
  monkeypatch.setenv("HF_TOKEN", "hf_wrong")
  assert "the hub does not accept the token" in refused(capfd, *words)
  monkeypatch.delenv("HF_TOKEN")
  assert "not logged in to the Hugging Face hub. Run `hf auth login`" in refused(capfd, *words)
  assert "user/a b: not the name of a repository" in refused(capfd, *words[:3], "--push=user/a b")
  monkeypatch.setattr(check, "missing", lambda kind: ["torch"])
  monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
  hub.role = "write"
  assert "comparing this format needs torch" in refused(capfd, *words)
  assert not hub.repos


def test_a_hub_out_of_reach(hub, capfd, monkeypatch):
  words = ("nowhere", "--format=npz", "--out=nowhere", "--push=user/clip")
  monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
  message = refused(capfd, *words)
  assert "http://127.0.0.1:1 cannot be reached: ConnectError" in message
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  close_session()  # a session reads the setting once
  try:
    assert "cannot be reached: HF_HUB_OFFLINE is set" in refused(capfd, *words)
  finally:
    close_session()


@pytest.mark.parametrize(
  "repo, answer, message",
  [
    ("other/clip", None, "this token may not write there. You don't have the rights"),
    ("user/clip", ("POST", "/commit/main", 403, "Forbidden: quota"), "Forbidden: quota"),
    ("user/clip", ("POST", "/preupload/main", 507, "full"), "answered with status 507. full"),
    ("user/clip", ("PUT", "", 403, "signature=abc"), "a file could not be uploaded"),
  ],
)
def test_an_upload_that_fails(repo, answer, message, hub, exported, verified, capfd):
  """The folder stays, and the command that uploads it later is shown."""
  if answer:
    hub.answers[answer[:2]] = answer[2:]
  shown = refused(capfd, "--check", exported, "--push", repo)
  assert message in shown and "signature" not in shown
  assert f"Try again: bigalign export --check {exported} --push {repo}" in shown
  assert not hub.repos.get(repo, {}).get("files")


def test_metadata_that_the_hub_refuses(hub, exported, verified, tmp_path, capfd):
  copy = tmp_path / "copy"
  copy.mkdir()
  for path in exported.iterdir():
    (copy / path.name).write_bytes(path.read_bytes())
  card = (copy / "README.md").read_text()
  (copy / "README.md").write_text(card.replace("license: mit", "license: ours"))
  assert '"license" must be one of' in refused(capfd, "--check", copy, "--push=user/clip")


def test_only_a_folder_that_matches_its_run_is_uploaded(
  hub, exported, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(check, "difference", lambda folder: 1e-2)
  outcome = tmp_path / "outcome.json"
  words = ["--check", str(exported), "--push=user/clip", f"--json={outcome}"]
  assert main.main(words) == 1
  assert not hub.repos
  found = json.loads(outcome.read_text())
  assert found == dict(folder=str(exported), difference=1e-2, matches=False, uploaded=None)
  monkeypatch.setattr(check, "difference", lambda folder: 1e-7)
  assert main.main([*words, "--private"]) == 0
  assert f"{hub.url}/user/clip: uploaded" in capsys.readouterr().out
  found = json.loads(outcome.read_text())
  assert found["matches"] and found["uploaded"] == f"{hub.url}/user/clip"
  assert hub.repos["user/clip"]["private"]


def test_a_private_folder_has_a_repository(capsys):
  with pytest.raises(SystemExit):
    main.main(["--check", "x", "--private"])
  assert "--private needs --push REPO" in capsys.readouterr().err


@pytest.mark.slow
def test_the_program_reads_the_environment(hub, exported, tmp_path):
  """HF_ENDPOINT and HF_TOKEN, as a user would set them."""
  env = os.environ | dict(
    HF_ENDPOINT=hub.url,
    HF_HUB_DISABLE_XET="1",
    HF_HOME=str(tmp_path),
    JAX_PLATFORMS="cpu",
    HF_TOKEN=hub_server.TOKEN,
  )
  code = (
    "from bigalign.export import check, main\n"
    "check.difference = lambda folder: 0.0\n"
    f"raise SystemExit(main.main(['--check', {str(exported)!r}, '--push', 'user/env']))"
  )
  done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert hub_server.TOKEN not in done.stdout + done.stderr
  files = hub.repos["user/env"]["files"]
  assert json.loads(files["bigalign.json"])["format"] == "hf"
