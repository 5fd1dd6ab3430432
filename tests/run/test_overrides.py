"""Options on the command line: any option, read by its type; unknown ones are explained."""

from __future__ import annotations

import ast
import doctest
import re
import shlex

import pytest
from absl import flags as absl_flags
from ml_collections import ConfigDict

from bigalign.config import Config, resolve_config
from bigalign.run import flags, overrides
from bigalign.run.configs import find_file, load_config, shipped
from bigalign.run.errors import UsageError
from bigalign.run.overrides import Word, names, read_words, take_words


@pytest.fixture(scope="module")
def configs():
  """The configs that the tests change, read once."""
  return {name: load_config(name) for name in ("tiny", "photos_frozen", "clipa_b16", "siglip_b16")}


def read(config, *words):
  """The values of the words of a command line."""
  found, others = take_words(words)
  assert not others
  return read_words(found, Config, config)


def test_examples():
  assert not doctest.testmod(overrides).failed


def test_words_are_taken_from_a_command_line():
  argv = ["bigalign train", "--config=tiny", "--config.a.b", "3", "--workdir", "x", "-config.c=d=e"]
  argv += ["--config.d", "--noconfig.e.f", "word", "--", "--config.g=1"]
  words, others = take_words(argv)
  assert words == [
    Word("a.b", "3"),
    Word("c", "d=e"),
    Word("d", None),
    Word("e.f", None, negated=True),
  ]
  assert others == [
    *("bigalign train", "--config=tiny", "--workdir", "x", "word"),
    *("--", "--config.g=1"),
  ]


def test_a_negative_number_is_a_value():
  assert take_words(["--config.loss.siglip.bias", "-3"])[0] == [Word("loss.siglip.bias", "-3")]


@pytest.mark.parametrize(
  ("config", "words", "wanted"),
  [
    # Durations are numbers or text.
    ("tiny", ["--config.total_steps=3 epochs"], {"total_steps": "3 epochs"}),
    ("tiny", ["--config.eval_every", "200"], {"eval_every": 200}),
    # A float takes an integer; exponents; negative numbers.
    ("tiny", ["--config.optimizer.lr=3"], {"optimizer.lr": 3.0}),
    ("tiny", ["--config.optimizer.lr=3e-4"], {"optimizer.lr": 3e-4}),
    ("tiny", ["--config.mesh.data", "-1"], {"mesh.data": -1}),
    # Switches.
    ("tiny", ["--config.data.shuffle"], {"data.shuffle": True}),
    ("tiny", ["--noconfig.data.shuffle"], {"data.shuffle": False}),
    ("tiny", ["--config.data.apply_exif=true"], {"data.apply_exif": True}),
    # None where the type has it; text elsewhere.
    ("tiny", ["--config.data.resize_edge=None"], {"data.resize_edge": None}),
    ("tiny", ["--config.data.source=None"], {"data.source": "None"}),
    # Tuples and lists, one element, repeated words.
    ("tiny", ["--config.data.augment.scale=(0.5, 1)"], {"data.augment.scale": (0.5, 1)}),
    ("tiny", ["--config.data.captions=json.captions"], {"data.captions": ("json.captions",)}),
    (
      "tiny",
      ["--config.data.captions=a", "--config.data.captions=b"],
      {"data.captions": ("a", "b")},
    ),
    (
      "tiny",
      ["--config.data.captions=[['a', 3], ['b', 1]]"],
      {"data.captions": (["a", 3], ["b", 1])},
    ),
    # A list replaces what was given before.
    (
      "tiny",
      ["--config.data.captions=a", "--config.data.captions=['b', 'c']", "--config.seed=1"],
      {"data.captions": ("b", "c"), "seed": 1},
    ),
    (
      "tiny",
      ["--config.data.augment.scale=(0.5, 1)", "--config.data.augment.scale=(0.4, 1)"],
      {"data.augment.scale": (0.4, 1)},
    ),
    (
      "tiny",
      ["--config.data.captions=['a']", "--config.data.captions=b", "--config.data.captions=c"],
      {"data.captions": ("b", "c")},
    ),
    # A text where both a text and a sequence are allowed.
    (
      "tiny",
      ["--config.evals.x.type=zeroshot", "--config.evals.x.templates=simple"],
      {"evals.x.type": "zeroshot", "evals.x.templates": "simple"},
    ),
    # A text, or texts by name.
    (
      "tiny",
      ["--config.evals.x.type=zeroshot", "--config.evals.x.classnames={'de': 'a.txt'}"],
      {"evals.x.type": "zeroshot", "evals.x.classnames": {"de": "a.txt"}},
    ),
    (
      "tiny",
      ["--config.evals.x.type=zeroshot", "--config.evals.x.classnames=a.txt"],
      {"evals.x.type": "zeroshot", "evals.x.classnames": "a.txt"},
    ),
    (
      "tiny",
      ["--config.evals.x.type=zeroshot", "--config.evals.x.templates=['a {}', 'b {}']"],
      {"evals.x.type": "zeroshot", "evals.x.templates": ("a {}", "b {}")},
    ),
    # Switches and None where any type is allowed.
    (
      "tiny",
      ["--config.data.source_options.shuffle_files=false", "--config.data.source_options.x=true"],
      {"data.source_options.shuffle_files": False, "data.source_options.x": True},
    ),
    ("tiny", ["--config.data.source_options.x=None"], {"data.source_options.x": None}),
    # A group that is given as a whole decides which options follow.
    (
      "tiny",
      ["--config.optimizer={'name': 'muon', 'lr': 1e-3}", "--config.optimizer.rms=0.7"],
      {"optimizer": {"name": "muon", "lr": 1e-3}, "optimizer.rms": 0.7},
    ),
    # Of other options the last word counts.
    ("tiny", ["--config.seed=1", "--config.seed=2"], {"seed": 2}),
    # Whole groups.
    ("tiny", ["--config.loss={'clip': {'weight': 2}}"], {"loss": {"clip": {"weight": 2}}}),
    ("tiny", ["--config.evals={}"], {"evals": {}}),
    ("tiny", ["--config.data.augment=None"], {"data.augment": None}),
    # Elements of sequences.
    ("photos_frozen", ["--config.data.mixture[1].weight=2"], {"data.mixture[1].weight": 2.0}),
    # Options of a stage have the types of the same options of the config.
    ("clipa_b16", ["--config.stages[0].batch_size=64"], {"stages[0].batch_size": 64}),
    ("clipa_b16", ["--config.stages[0].until=2000"], {"stages[0].until": 2000}),
    (
      "clipa_b16",
      ["--config.stages[0].model.image.patch_dropout=0", "--config.stages[0].data.augment=None"],
      {"stages[0].model.image.patch_dropout": 0.0, "stages[0].data.augment": None},
    ),
    (
      "clipa_b16",
      ["--config.stages[0].data.augment.scale=(0.5, 1)", "--config.stages[0].until=90%"],
      {"stages[0].data.augment.scale": (0.5, 1), "stages[0].until": "90%"},
    ),
    # Names may hold what text holds.
    ("tiny", ["--config.data.source=/d/{00..09}.tar"], {"data.source": "/d/{00..09}.tar"}),
  ],
)
def test_a_text_is_read_by_the_type_of_its_option(config, words, wanted, configs):
  values = read(configs[config], *words)
  assert values == wanted
  assert [type(x) for x in values.values()] == [type(x) for x in wanted.values()]


@pytest.mark.parametrize(
  ("config", "words"),
  [
    ("siglip_b16", ["--config.loss.siglip.b_init=-8", "--config.data.tokenizer.path=x.model"]),
    ("tiny", ["--config.optimizer.rms=0.7", "--config.optimizer.name=muon"]),
    ("tiny", ["--config.loss.clip.label_smoothing=0.1", "--config.data.source_options.image=jpg"]),
    ("tiny", ["--config.evals.new.type=glyphs", "--config.evals.new.split=heldout_dev"]),
    ("tiny", ["--config.data.augment.color_jitter.brightness=0.4"]),
    ("tiny", ["--config.model.image.init=/w", "--config.model.image.fresh=x"]),
    ("tiny", ["--config.model.open_clip=ViT-B-32"]),
    ("photos_frozen", ["--config.model.text.pool=mean"]),  # a tower that its checkpoint names
  ],
)
def test_options_that_the_file_does_not_write_can_be_given(config, words, configs):
  values = read(configs[config], *words)
  assert len(values) == len(words)
  changed = load_config(configs[config], values)
  assert all(
    changed[name.split(".")[0]] != configs[config].get(name.split(".")[0]) for name in values
  )


def test_a_text_of_an_option_of_any_type_stays_one():
  config = {"data": {"source_options": {"split": "x"}}}
  words = ["--config.data.source_options.split=true"]
  assert read(config, *words) == {"data.source_options.split": "true"}


def test_options_given_on_the_command_line_are_those_of_the_run(configs):
  words = ["--config.total_steps=2 epochs", "--config.loss.siglip.weight=2", "--config.keep.last=7"]
  changed = load_config(configs["tiny"], read(configs["tiny"], *words, "--config.data.shuffle=0"))
  config = resolve_config(changed)
  assert config.total_steps == "2 epochs" and config.keep.option("last") == 7
  assert config.loss["siglip"].option("weight") == 2.0 and config.data.shuffle is False


def test_every_option_of_a_shipped_config_can_be_given(configs):
  """Each value that a config writes, typed as text, is read as the same value."""
  for config in configs.values():
    words = [f"--config.{name}={value}" for name, value in _written(config.to_dict())]
    values = read(config, *words)
    changed = load_config(config, values).to_dict()
    assert len(words) > 20
    for (name, value), read_back in zip(_written(config.to_dict()), values.values()):
      assert read_back == value, name
    assert changed == config.to_dict()


def _written(values, before=""):
  for name, value in values.items():
    if isinstance(value, dict) and value:
      yield from _written(value, f"{before}{name}.")
    else:
      yield before + name, value


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (
      ["--config.batchsize=1"],
      r"^config: unknown option 'batchsize'\. Did you mean 'batch_size'\? ",
    ),
    (["--config.lr=1"], r"^config: unknown option 'lr'\. Did you mean config\.optimizer\.lr\?"),
    (
      ["--config.optimizer.learning_rate=1"],
      r"Did you mean config\.optimizer\.lr\? Options: name, lr",
    ),
    (["--config.optimizer.rms=1"], r"unknown option 'rms'\. It is an option of muon\."),
    (["--config.data.tokenizer.path=x"], r"It is an option of sentencepiece, wordpiece, hf, clip"),
    (
      ["--config.loss.siglp.weight=1"],
      r"^config\.loss: unknown option 'siglp'\. Did you mean 'sig",
    ),
    (["--config.data.workrs=1"], r"and \d+ more; `bigalign options data` explains all$"),
    (["--config.seed.x=1"], r"^config\.seed is a single value; it has no option 'x'"),
    (
      ["--config.data.mixture.weight=1"],
      r"its elements are config\.data\.mixture\[0\], not 'weight'",
    ),
    (["--config.evals[0]=1"], r"its elements are config\.evals\.NAME, not 0"),
    (["--config.optimizer.lr=fast"], r"^config\.optimizer\.lr='fast' must be float$"),
    (["--config.batch_size=1.5"], r"^config\.batch_size='1\.5' must be int$"),
    (["--config.data.shuffle=maybe"], r"^config\.data\.shuffle='maybe' must be bool$"),
    (["--config.loss=clip"], r"config\.loss='clip' must be a group"),
    (["--config.loss={[]: 1}"], r"^config\.loss=.* must be a group"),
    (
      ["--config.model.image_projector=mlp"],
      r"to choose mlp, write --config\.model\.image_projector\.name=mlp$",
    ),
    (
      ["--config.seed"],
      r"^--config\.seed: config\.seed needs a value, --config\.seed=VALUE; it is int",
    ),
    (["--noconfig.seed"], r"^--noconfig\.seed"),
    (
      ["--config.stages[0].batch_size=fast"],
      r"^config\.stages\[0\]\.batch_size='fast' must be int$",
    ),
    (
      ["--config.stages[0].data.tokenizer.length=1.5"],
      r"^config\.stages\[0\]\.data\.tokenizer\.length='1\.5' must be int$",
    ),
    (
      ["--config.stages[0].batchsize=64"],
      r"^config\.stages\[0\]: unknown option 'batchsize'\. Did you mean 'batch_size'\?",
    ),
    (["--config.mesh.fsdp=2", "--config.mesh={}"], r"--config\.mesh after .* would undo it"),
  ],
)
def test_mistakes_are_explained(words, message, configs):
  config = "clipa_b16" if "stages" in words[0] else "tiny"
  with pytest.raises((TypeError, ValueError), match=message) as error:
    read(configs[config], *words)
  assert len(str(error.value)) < 400


def test_names_reach_the_whole_config(configs):
  found = {*names(Config, configs["tiny"])}
  wanted = {"seed", "data.augment.color_jitter.hue", "loss.siglip.weight", "model.image.init"}
  assert {f"config.{name}" for name in wanted} <= found
  assert "config.loss.clip.weight" not in found  # this config has another loss


@pytest.mark.parametrize("name", shipped())
def test_the_commands_of_a_shipped_config_use_options_that_exist(name):
  docstring = ast.get_docstring(ast.parse(find_file(name).read_text())).replace("\\\n", " ")
  commands = re.findall(r"^ *bigalign (?:train|embed) .*", docstring, re.MULTILINE)
  for line in commands:
    found, others = take_words(shlex.split(line))
    assert f"--config={name}" in others, line
    read_words(found, Config, load_config(name))


@pytest.fixture
def program(monkeypatch):
  """Parses a command line of a program with new flags; returns the flags and other words."""

  def parse(name, *words):
    values = absl_flags.FlagValues()
    monkeypatch.setattr(absl_flags, "FLAGS", values)
    for kind in ("flag", "string", "bool", "integer", "list", "enum"):
      define = getattr(absl_flags, f"DEFINE_{kind}")
      options = dict(flag_values=values)
      monkeypatch.setattr(
        absl_flags,
        f"DEFINE_{kind}",
        lambda *args, define=define, options=options, **kw: define(*args, **{**options, **kw}),
      )
    flags.define_flags(lambda: Config, name)
    rest = flags.parse_flags([f"bigalign {name}", *words])
    monkeypatch.undo()
    return values, rest

  return parse


def test_a_command_line_gives_the_config_with_its_overrides(program):
  values, rest = program(
    "train", "--config", "tiny", "--workdir=x", "--config.seed=3", "--config.mesh.fsdp", "2", "word"
  )
  assert isinstance(values.config, ConfigDict)
  assert (values.config.seed, values.config.mesh.fsdp, values.workdir) == (3, 2, "x")
  assert rest == ["bigalign train", "word"]


def test_embed_and_plan_have_flags_of_their_own(program):
  values, _ = program("embed", "--config=tiny", "--out=x", "--towers=text", "--tokens")
  assert (values.towers, values.tokens, values.dtype) == (["text"], True, "float16")
  values, _ = program("plan", "--config=tiny", "--topology=v5e:2x2", "--batch=64")
  assert (values.topology, values.batch) == ("v5e:2x2", 64)


@pytest.mark.parametrize(
  ("words", "error", "message"),
  [
    ([], UsageError, r"^--config=NAME or --config=FILE is missing\. Shipped configs: .*tiny"),
    (["--config=nope.py"], FileNotFoundError, r"^No config file nope\.py\. Shipped configs"),
    (
      ["--config=tiny", "--wrkdir=x"],
      UsageError,
      r"'wrkdir'. Did you mean: workdir\? `bigalign tra",
    ),
    (["--config=tiny", "--process_id=x"], UsageError, r"process_id=x.*`bigalign train --help`"),
    (["--config=tiny", "--config.sed=1"], TypeError, r"Did you mean 'seed'"),
    (["--config=tiny", "--flagfile=nope.txt"], UsageError, r"nope\.txt"),
  ],
)
def test_wrong_command_lines(words, error, message, program):
  with pytest.raises(error, match=message):
    program("train", *words)
