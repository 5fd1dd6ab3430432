"""Options are defined once, resolved once, and read nowhere else."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import pytest
from helpers.shipped import ROOT, load

from bigalign.config import (
  Config,
  recorded_config,
  resolve_config,
  tokenizer_digest,
  with_tokenizer_digest,
)
from bigalign.data.text.tokenizers import TOKENIZERS
from bigalign.evals import EVALS
from bigalign.losses import LOSSES
from bigalign.optim import OPTIMIZERS
from bigalign.options import (
  Also,
  Call,
  Choose,
  Component,
  call,
  definition,
  fits,
  plain,
  resolve,
  without_defaults,
)
from bigalign.run.provenance import digest
from bigalign.towers import TOWERS

# The resolver: what turns the plain values of a config into options. variants.py makes configs that
# are resolved later, init.py reads what config.model says of pretrained checkpoints; the rest of
# weights/ reads the configs of other libraries.
RESOLVER = {
  "bigalign/options.py",
  "bigalign/config.py",
  "bigalign/plan/variants.py",
  "bigalign/api/checkpoints.py",  # like weights/: what files state, before it is resolved
}
GROUPS = re.compile(
  r"(^|\.)(config|configs|data|model|loss|optimizer|evals|mesh|keep|writer|runtime|tokenizer|augment"
  r"|values|options|stores|reading)$"
)

NOT_OURS = re.compile(r"^(layout|checkpoint)\.model$|^jax\.")  # of a checkpoint, of JAX


def reads(source: str) -> list[str]:
  """Reads of a config as a dict in some code: config["data"], data.get("resize")."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
      is_read, group = node.func.attr == "get", node.func.value
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
      is_read, group = (
        isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str),
        (node.value),
      )
    else:
      continue
    # config["data"]["source"] is one read for each level.
    name = ast.unparse(group)
    name = re.sub(r"\[.*\]$", "", name)
    if is_read and GROUPS.search(name) and not NOT_OURS.search(name):
      found.append(f"{node.lineno}: {ast.unparse(node)}")
  return found


def test_reads_of_config_dicts_are_found():
  assert reads('config["data"]["source"]') and reads('x = run.config.data.get("resize", 1)')
  assert (
    not reads("config.data.resize") and not reads('row["step"]') and not reads('model["x"] = 1')
  )


def test_nothing_reads_a_config_dict_but_the_resolver():
  for path in sorted((ROOT / "bigalign").rglob("*.py")):
    name = str(path.relative_to(ROOT))
    if name in RESOLVER or name.startswith("bigalign/weights/"):
      continue
    assert not reads(path.read_text()), f"{name} reads a config as a dict; add a field to an option"


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.py")), ids=lambda path: path.stem)
def test_resolved_options_are_saved_and_read_back(path):
  config = resolve_config(_with_sizes(load(path.stem).to_dict()), files_needed=False)
  saved = json.loads(json.dumps({"config": plain(config)}))
  assert recorded_config(saved) == config
  assert saved["config"]["data"]["apply_exif"] is False  # a default is saved too


def _with_sizes(values):
  """A config whose towers have sizes next to their `init`, as if the checkpoints were missing."""
  for side, name in (("image", "vit"), ("text", "bert")):
    tower = values["model"][side]
    if "init" in tower and "name" not in tower:
      sizes = dict(name=name, variant="Ti")
      sizes |= dict(vocab_size=100, length=64) if name == "bert" else {}
      values["model"][side] = {**tower, **sizes}
  return values


def test_every_option_is_documented():
  missing = []
  for name, target, fixed in _all_groups():
    options = definition(target, fixed)
    missing += [f"{name}.{option}" for option, found in options.items() if not found.doc]
  assert not missing


def _all_groups():
  """(name, function or class, fixed parameters) of all that a config resolves to."""
  left: list[tuple[str, Any, tuple[str, ...]]] = [("config", Config, ())]
  seen = set()
  while left:
    name, target, fixed = left.pop()
    if target in seen:
      continue
    seen.add(target)
    yield name, target, fixed
    for option, found in definition(target, fixed).items():
      left += _inside(f"{name}.{option}", found.type)


def _inside(name, kind):
  """The groups that a type holds."""
  if isinstance(kind, type) and dataclasses.is_dataclass(kind):
    return [(name, kind, ())]
  if isinstance(kind, Also):
    return [(name, kind.group, ())]
  if isinstance(kind, Call):
    return [(name, kind.function, kind.fixed)]
  if isinstance(kind, Choose):
    return [(f"{name}.{entry}", x, (*kind.fixed, kind.key)) for entry, x in kind.registry.items()]
  parts = [*getattr(kind, "__args__", ()), *getattr(kind, "__metadata__", ())]
  return [group for part in parts for group in _inside(name, part)]


def test_registries_are_reached_from_the_config():
  targets = {target for _, target, _ in _all_groups()}
  for registry in (LOSSES, TOWERS, OPTIMIZERS, TOKENIZERS, EVALS):
    assert {*registry.values()} <= targets


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
  """A group of options.

  Args:
    size: pixels.
  """

  size: int = 3


def function(*, rate: float, names: Sequence[str] = (), box: tuple[float, float] = (0.0, 1.0)):
  """A function whose parameters are options.

  Args:
    rate: per second,
      in two lines.
    names: some names.
    box: low and high.
  """
  return rate, names, box


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
  """Groups in groups.

  Args:
    one: a function.
    inner: a dataclass.
    several: a mapping of choices.
    maybe: a function or nothing.
  """

  one: Annotated[Component, Call(function)]
  inner: Inner = None  # type: ignore[assignment]
  several: Annotated[Mapping[str, Component], Choose({"f": function}, key="")] = None  # type: ignore[assignment]
  maybe: Annotated[Component | None, Call(function)] = None


def test_defaults_are_filled_in_at_every_level():
  options = resolve(Outer, dict(one=dict(rate=2, box=[0.5, 1])), "config")
  assert options.one.options == dict(rate=2, names=(), box=(0.5, 1))
  assert options.inner == Inner(size=3) and options.several == {} and options.maybe is None
  assert options.one.make() == (2, (), (0.5, 1))
  assert resolve(Outer, plain(options), "config") == options
  with pytest.raises(dataclasses.FrozenInstanceError):
    options.inner = Inner()


def test_options_that_differ_from_their_defaults():
  options = resolve(Outer, dict(one=dict(rate=2, names=[]), inner=dict(size=4)), "config")
  assert without_defaults(options.one) == dict(rate=2)
  assert without_defaults(options.inner) == dict(size=4)


@pytest.mark.parametrize(
  ("values", "error", "message"),
  [
    (dict(), TypeError, r"^config: option 'one' is missing\. Options: \['one', 'inner'"),
    (dict(one={}), TypeError, r"^config\.one: option 'rate' is missing"),
    (dict(one=dict(rat=1)), TypeError, r"config\.one: unknown option 'rat'\. Did you mean 'rate'"),
    (
      dict(one=dict(rate="1")),
      TypeError,
      r"config\.one\.rate='1' is of type str; it must be float",
    ),
    (dict(one=dict(rate=True)), TypeError, r"config\.one\.rate=True is of type bool"),
    (dict(one=dict(rate=1, names="ab")), TypeError, r"names='ab' .* must be Sequence\[str\]"),
    (dict(one=dict(rate=1, box=[1, 2, 3])), TypeError, r"box=\[1, 2, 3\] .* tuple\[float, float\]"),
    (dict(one=dict(rate=1), inner=3), TypeError, r"config\.inner=3 is of type int; .*\['size'\]"),
    (
      dict(one=dict(rate=1), inner=dict(size=1.5)),
      TypeError,
      r"config\.inner\.size=1\.5 .* be int",
    ),
    (dict(one=dict(rate=1), several=dict(g={})), ValueError, r"config\.several: unknown 'g'.*'f'"),
    (dict(one=dict(rate=1), maybe=3), TypeError, r"config\.maybe=3 is of type int"),
  ],
)
def test_wrong_values_are_named_with_their_place(values, error, message):
  with pytest.raises(error, match=message):
    resolve(Outer, values, "config")


def test_types_are_checked_without_the_future_import():
  """Annotations that are types, not text, are checked too."""
  module = types.ModuleType("plain_annotations")
  exec("def f(*, size: int, name: str | None = None): return size", module.__dict__)
  assert call(module.f, dict(size=3), "config") == 3
  with pytest.raises(TypeError, match=r"config\.size='3' is of type str; it must be int"):
    call(module.f, dict(size="3"), "config")
  with pytest.raises(TypeError, match=r"config\.name=3 .* it must be str \| None"):
    call(module.f, dict(size=3, name=3), "config")


def test_what_fits_a_type():
  assert fits(3, float) and fits(None, int | None) and fits([[1, 2]], Sequence[tuple[int, int]])
  assert not fits(True, int) and not fits("a", Sequence[str]) and not fits(1.0, int)
  assert fits({"a": 1}, Mapping[str, int]) and not fits({"a": "b"}, Mapping[str, int])


def test_documentation_spans_lines():
  assert definition(function)["rate"].doc == "per second, in two lines."


def test_unknown_options_of_a_config_are_named_at_their_place():
  values = load("tiny").to_dict()
  for change, message in (
    (dict(sead=1), r"^config: unknown option 'sead'\. Did you mean 'seed'"),
    (dict(mesh=dict(fspd=2)), r"^config\.mesh: unknown option 'fspd'\. Did you mean 'fsdp'"),
    (dict(evals=dict(v=dict(type="retrieval", source="x", cap=1))), r"config\.evals\.v: unknown"),
    (dict(keep=dict(last="2")), r"config\.keep\.last='2' is of type str; it must be int"),
    (dict(log_every=2.5), r"config\.log_every=2\.5 is of type float; it must be int"),
    (dict(loss=1.0), r"config\.loss=1\.0 must be a dict"),
  ):
    with pytest.raises(TypeError, match=message):
      resolve_config({**values, **change})


def test_a_tokenizer_recorded_as_written_is_the_same_tokenizer():
  """Runs from before options were resolved recorded a digest of the options that were written."""
  values = load("tiny").to_dict()
  config = resolve_config(values)
  for written in (values["data"]["tokenizer"], dict(name="byte", length=48, lower=False)):
    old = {**values, "data": {**values["data"], "tokenizer": written}}
    record = {"config": old, "tokenizer": digest(written)}
    assert with_tokenizer_digest(record)["tokenizer"] == tokenizer_digest(config)
  other = {"config": values, "tokenizer": digest(dict(name="byte", length=48, lower=True))}
  assert with_tokenizer_digest(other)["tokenizer"] != tokenizer_digest(config)
