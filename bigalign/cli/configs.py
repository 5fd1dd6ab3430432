"""Lists the shipped configs, prints or copies one: bigalign configs siglip_b16 --copy mine.py."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence

import rich.table
from rich.markup import escape

from bigalign.data.files import storage
from bigalign.run import tables
from bigalign.run.configs import find_file, folder, shipped, summary


def copy(name: str, target: pathlib.Path) -> None:
  """Writes a copy of a config to a new file.

  Raises:
    FileExistsError: if the file exists; it is not overwritten.
    FileNotFoundError: if the config does not exist.
  """
  text = find_file(name).read_bytes()
  if target.is_dir():
    target = target / f"{pathlib.Path(name).stem}.py"
  if target.exists():
    raise FileExistsError(f"--copy {target} exists; give the path of a new file")
  target.parent.mkdir(parents=True, exist_ok=True)
  with storage.atomic_write(target) as file:
    file.write(text)
  print(f"{target}: a copy of {name}; train it: bigalign train --config={target}")


def main(words: Sequence[str] | None = None) -> None:
  """The program."""
  parser = argparse.ArgumentParser(
    prog="bigalign configs",
    description="Lists the configs that are installed with bigalign; prints one of them; copies it"
    " to a file of your own. --config=NAME of the other programs takes these names.",
  )
  parser.add_argument("name", nargs="?", help="print this config")
  parser.add_argument("--copy", metavar="FILE", help="write it to a new file instead")
  parser.add_argument("--json", action="store_true", help="print the list as JSON")
  args = parser.parse_args(words)
  if args.copy and not args.name:
    parser.error("--copy needs the name of a config")
  if args.copy:
    copy(args.name, pathlib.Path(args.copy))
  elif args.name:
    print(find_file(args.name).read_text(), end="")
  elif args.json:
    found = {
      name: dict(about=summary(name), file=str(folder() / f"{name}.py")) for name in shipped()
    }
    print(json.dumps(found, indent=1))
  else:
    table = rich.table.Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for name in shipped():
      table.add_row(name, escape(summary(name)))
    tables.show(table)


def run() -> None:
  """The program `bigalign configs`."""
  main()
