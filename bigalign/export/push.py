"""Uploads an exported folder to the Hugging Face hub: bigalign export … --push user/clip"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from bigalign import checks, private_apis
from bigalign.export import model_card, published
from bigalign.export.formats import FORMATS
from bigalign.weights.files import read_json

_ABOUT, _CARD = "bigalign.json", "README.md"
_TOKENS = "https://huggingface.co/settings/tokens"


def check_account(repo: str) -> None:
  """Call it before long work: fails if nothing can be pushed from here.

  The token is that of `hf auth login` or HF_TOKEN; huggingface_hub reads it.

  Args:
    repo: the repository, "user/name" or "organisation/name".

  Raises:
    ImportError: if huggingface_hub is missing.
    ValueError: if this cannot be the name of a repository.
    PermissionError: without a token, with a wrong one, or with one that can only read.
    OSError: if the hub cannot be reached.
  """
  if importlib.util.find_spec("huggingface_hub") is None:
    raise ImportError("--push needs huggingface_hub: pip install 'bigalign[hub]'")
  from huggingface_hub import HfApi, get_token
  from huggingface_hub.errors import HFValidationError
  from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

  try:
    validate_repo_id(repo)
  except HFValidationError as error:
    raise ValueError(
      f"--push={repo}: not the name of a repository, such as user/clip: {error}"
    ) from error
  with _explained(repo):
    if get_token() is None:
      raise PermissionError(
        f"--push={repo}: not logged in to the Hugging Face hub. Run `hf auth login`, or set"
        " HF_TOKEN."
      )
    account = HfApi().whoami()
  role = (account.get("auth") or {}).get("accessToken", {}).get("role")
  if role == "read":
    raise PermissionError(
      f"--push={repo}: the token of {account['name']} can only read. Create one that can write at"
      f" {_TOKENS}."
    )


def push(folder: pathlib.Path, repo: str, *, private: bool = False) -> str:
  """Uploads the files of a folder as one commit, and returns the address of the repository.

  Hidden files and folders are not uploaded. The code in the model card then loads the repository,
  and paths of this machine are without their folders. Other files of an existing repository stay.

  Args:
    folder: written by bigalign export.
    repo: the repository; it is created if it does not exist.
    private: whether only its owner may read it.

  Raises:
    ValueError: if the folder names no known format, the hub refuses the metadata of the model
      card, or the repository is public and should be private.
    PermissionError: if the account may not write to the repository.
    OSError: if the hub cannot be reached or reports another error.
  """
  from huggingface_hub import CommitOperationAdd, HfApi

  about = read_json(folder / _ABOUT)
  kind = checks.choose(FORMATS, str(about.get("format")), f"{folder / _ABOUT}: format")
  card = published.card((folder / _CARD).read_text(encoding="utf-8"), about)
  step = f", step {about['step']}" if about.get("step") is not None else ""  # converted: none
  message = f"{about.get('name') or folder.resolve().name}{step}, exported by bigalign"
  names = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
  files: dict[str, Any] = {
    name.as_posix(): folder / name
    for name in names
    if not any(part.startswith(".") for part in name.parts)
  }
  files[_ABOUT] = f"{json.dumps(published.facts(about), indent=1)}\n".encode()
  api = HfApi()
  with _explained(repo):
    address = api.create_repo(repo, private=True if private else None, exist_ok=True)
    repo = address.repo_id
    if private and not api.model_info(repo).private:
      raise ValueError(
        f"--private: {address} exists and is public. Make it private in its settings, or choose"
        " another name."
      )
    files[_CARD] = model_card.for_hub(card, kind, repo).encode()
    api.create_commit(
      repo,
      [CommitOperationAdd(name, content) for name, content in files.items()],
      commit_message=message,
    )
  return str(address)


@contextlib.contextmanager
def _explained(repo: str) -> Iterator[None]:
  """A context in which errors of huggingface_hub become short ones.

  Their own texts can hold signed addresses of an upload, so only what the hub says is repeated.
  """
  from huggingface_hub import constants
  from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

  http_error = private_apis.error_of_hub_requests()
  try:
    yield
  except HfHubHTTPError as error:
    status, said = error.response.status_code, f" {error.server_message or ''}".rstrip()
    if status == 401:
      raise PermissionError(
        f"--push={repo}: the hub does not accept the token.{said} Run `hf auth login` again, or"
        " set another HF_TOKEN."
      ) from None
    if status in (403, 404):
      raise PermissionError(
        f"--push={repo}: this token may not write there.{said} Name a repository of your account"
        f" or of your organisation, and create a token that can write at {_TOKENS}."
      ) from None
    raise OSError(f"--push={repo}: the hub answered with status {status}.{said}") from None
  except (OfflineModeIsEnabled, http_error) as error:
    why = (
      "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else type(error).__name__
    )
    raise ConnectionError(f"--push={repo}: {constants.ENDPOINT} cannot be reached: {why}") from None
  except RuntimeError as error:  # of a file's upload; the reason is in the cause
    why = type(error.__cause__ or error).__name__
    raise OSError(f"--push={repo}: a file could not be uploaded: {why}") from None
