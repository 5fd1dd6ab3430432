"""What losses cost on a mesh: loss x way to form the logits -> memory, products, bytes on wires.

Every figure is read from the compiled program of the loss and its gradients, for a pod that nobody
needs to hold (`--topology v5e:16x16`, with the extra `plan`) or for the devices of this machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import rich.box
import rich.console
import rich.progress
import rich.table

from bigalign import checks, losses, sharding
from bigalign.losses.engine import pairwise
from bigalign.losses.per_sample import tables
from bigalign.plan import hlo_collectives, topologies
from bigalign.run import flops, runtime

TOKENS = (16, 16)  # of an image and of a text, for the losses that read tokens
LEARNED = ("z", "raw_", "tokens_")  # how the features that have a gradient begin
WAYS = [way for way in pairwise.WAYS if way != "auto"]


def fields(batch: int, width: int) -> dict[str, jax.ShapeDtypeStruct]:
  """All that a loss may ask for, as shapes: features and fields of a global batch."""
  features = (
    "zimg",
    "ztxt",
    "ztxt_second",
    "raw_img",
    "raw_txt",
    "teacher_img",
    "teacher_txt",
    "teacher_txt_second",
  )
  shapes: dict[str, tuple[tuple[int, ...], Any]] = {
    **dict.fromkeys(features, ((batch, width), jnp.float32)),
    "tokens_img": ((batch, TOKENS[0], width), jnp.float32),
    "tokens_txt": ((batch, TOKENS[1], width), jnp.float32),
    "mask_txt": ((batch, TOKENS[1]), jnp.bool_),
    "noise_prob": ((batch,), jnp.float32),
    "label": ((batch,), jnp.int32),
    "image_id": ((batch, 2), jnp.uint32),
    "text_id": ((batch, 2), jnp.uint32),
  }
  return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def measure(
  name: str,
  way: str,
  mesh: jax.sharding.Mesh,
  *,
  batch: int,
  width: int,
  samples: int = 0,
  dtype: str = "float32",
  options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """The costs of one loss, formed in one way, value and gradients together.

  Args:
    batch, width: B pairs of E numbers, over the whole mesh.
    samples: ids of images, and as many of texts, that a loss with a memory keeps; the batch if 0.
    dtype: of the features on the wires and in the products.
    options: of the loss.

  Returns:
    "needs", "state_bytes" (of all devices); per device "temporary_bytes", "wire_bytes", "flops", or
    "error" where it does not compile, for want of memory.
  """
  if options is None and name == "albef_itc":  # its queue holds whole batches
    options = {"queue_size": -(-65_536 // batch) * batch}
  loss = losses.make_loss({name: dict(options or {})})
  sizes = {"image": samples or batch, "text": samples or batch, "embed": width}
  params, state = jax.eval_shape(lambda: loss.init(sizes))
  names = {"zimg", "ztxt", *(name for need in loss.needs for name in losses.PROVIDES[need])}
  names |= {"mask_txt"} if "tokens" in loss.needs else set()
  abstract = {name: x for name, x in fields(batch, width).items() if name in names}

  def value(params: Any, feats: Any, state: Any, rest: Any) -> Any:
    context = losses.first_context(pairwise.Engine(way, dtype))
    objective, (after, _) = loss.apply(params, state, {**rest, **feats}, rest, context)
    return objective, after

  def placed(x: Any, spec: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec)

  rows = sharding.batch_sharding(mesh)
  params = jax.tree.map(lambda x: placed(x, sharding.replicated_sharding(mesh)), params)
  state = jax.tree.map(lambda x: placed(x, tables.state_sharding(x, mesh)), state)
  feats = {k: placed(x, rows) for k, x in abstract.items() if k.startswith(LEARNED)}
  rest = {k: placed(x, rows) for k, x in abstract.items() if k not in feats}
  places = jax.tree.map(lambda x: x.sharding, ((None, state), (params, feats)))
  found: dict[str, Any] = {
    "loss": name,
    "way": way,
    "needs": sorted(loss.needs),
    "batch": batch,
    "width": width,
    "devices": mesh.size,
    "state_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
  }
  with jax.set_mesh(mesh):
    both = jax.value_and_grad(value, (0, 1), has_aux=True)
    traced = jax.jit(both, donate_argnums=2, out_shardings=places).trace(params, feats, state, rest)
    found["flops"] = flops.of_jaxpr(traced.jaxpr) / mesh.size
    try:
      compiled = topologies.compile_without_cache(traced.lower())
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return {**found, "error": str(error).splitlines()[0]}
  moved = hlo_collectives.collectives(compiled.as_text())
  return {
    **found,
    "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    "wire_bytes": {kind: x.bytes for kind, x in moved.items()},
  }


def table(rows: Sequence[Mapping[str, Any]], *, markdown: bool) -> rich.table.Table:
  """The rows for a person; products also as multiples of B B E / devices."""
  made = rich.table.Table(box=rich.box.MARKDOWN if markdown else rich.box.SIMPLE)
  for heading in ("loss", "way", "needs", "state", "temporaries", "products", "wires"):
    made.add_column(heading, justify="left" if heading in ("loss", "way", "needs") else "right")
  for row in rows:
    start = (row["loss"], row["way"], " ".join(row["needs"]), _size(row["state_bytes"]))
    whole = row["batch"] ** 2 * row["width"] / row["devices"]
    work = f"{row['flops'] / 1e9:,.0f} GF = {row['flops'] / whole:.1f}"
    if "error" in row:
      made.add_row(*start, "does not fit", work, "")
    else:
      wires = sum(row["wire_bytes"].values())
      made.add_row(*start, _size(row["temporary_bytes"]), work, _size(wires))
  return made


def _size(n: float) -> str:
  return f"{n / 1e6:,.1f} MB" if n else ""


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
  """The program; returns the rows that it prints."""
  parser = argparse.ArgumentParser(
    prog="bigalign costs",
    description="What each loss costs per device: temporaries, products and bytes on the wires of"
    " the compiled loss and its gradients.",
  )
  parser.add_argument("--losses", metavar="A,B", help="all if not given")
  parser.add_argument("--ways", metavar="A,B", default=",".join(WAYS), help="%(default)s, or auto")
  parser.add_argument("--batch", type=int, default=32768, help="pairs in all (%(default)s)")
  parser.add_argument("--width", type=int, default=512, help="of the embeddings (%(default)s)")
  parser.add_argument("--samples", type=int, default=0, help="ids that a loss with a memory keeps")
  parser.add_argument("--dtype", default="float32", help="on the wires (%(default)s, or bfloat16)")
  parser.add_argument("--topology", help="a TPU slice such as v5e:16x16; else this machine")
  parser.add_argument("--fsdp", type=int, default=1, help="size of that mesh axis; data: the rest")
  parser.add_argument("--markdown", action="store_true", help="print a table for a document")
  parser.add_argument("--json", metavar="FILE", help="write the figures there too")
  args = parser.parse_args(argv)
  runtime.setup()
  names = args.losses.split(",") if args.losses else sorted(losses.LOSSES)
  ways = args.ways.split(",")
  for name in names:
    checks.choose(losses.LOSSES, name, "--losses")
  held = topologies.devices(args.topology) if args.topology else jax.devices()
  mesh = sharding.make_mesh(fsdp=args.fsdp, devices=held)
  sharding.host_rows(mesh, args.batch)
  rows = []
  progress = rich.console.Console(stderr=True)
  for name, way in rich.progress.track(
    list(itertools.product(names, ways)),
    "compiling",
    console=progress,
    disable=not progress.is_terminal,
  ):
    rows.append(
      measure(
        name,
        way,
        mesh,
        batch=args.batch,
        width=args.width,
        samples=args.samples,
        dtype=args.dtype,
      )
    )
  where = args.topology or f"{mesh.size} x {held[0].device_kind}"
  console = rich.console.Console(width=160 if args.markdown else None)
  console.print(f"B = {args.batch:,}, E = {args.width}, {args.dtype}, {where}; per device")
  console.print(table(rows, markdown=args.markdown))
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
  return rows


def run() -> None:
  """The program `bigalign costs`."""
  main()


if __name__ == "__main__":
  run()
