"""`bigalign costs`: memory, products and communication of each loss and way to form the logits.

Every figure is read from the compiled program of the loss and its gradients, for the devices of
this machine or for a TPU slice that need not be available (`--topology v5e:16x16`, with the extra
`plan`).
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import rich.box
import rich.table

from bigalign import checks, sharding
from bigalign.losses import BATCH_OPTIONS, LOSSES, PROVIDES, first_context, make_loss
from bigalign.losses.engine import pairwise
from bigalign.losses.per_sample import tables
from bigalign.plan import hlo_collectives, topologies
from bigalign.private_apis import is_out_of_memory
from bigalign.run import flops, parsers, progress, runtime
from bigalign.run.tables import show, write_json

TOKENS = (16, 16)  # per image and per text, for the losses that read tokens
TEXTS = 4  # per image, for the losses that read several
LEARNED = ("z", "raw_", "tokens_")  # prefixes of the features that get a gradient
WAYS = [way for way in pairwise.WAYS if way != "auto"]
HEADINGS = ("loss", "way", "needs", "state", "temporaries", "products", "communicated")


def fields(
  batch: int, width: int, teachers: Sequence[int] = (), teacher_dtype: str = "float32"
) -> dict[str, jax.ShapeDtypeStruct]:
  """{name: shape and dtype} of all features and batch fields that a loss may read.

  Args:
    batch: number B of images.
    width: E of the embeddings.
    teachers: widths of the teachers' embeddings; (): one teacher as wide as the embeddings.
    teacher_dtype: of the teachers' embeddings.
  """
  features = ("zimg", "ztxt", "ztxt_second", "raw_img", "raw_txt", "zquery", "zdocument")
  names = ("teacher_img", "teacher_txt", "teacher_txt_second")
  stored = (*names, "teacher_img_stored", "teacher_txt_stored")
  teacher = sum(teachers) or width
  shapes: dict[str, tuple[tuple[int, ...], Any]] = {
    **dict.fromkeys(features, ((batch, width), jnp.float32)),
    **dict.fromkeys(stored, ((batch, teacher), teacher_dtype)),
    "zimgs": ((batch, 2, width), jnp.float32),
    "ztxts": ((batch, TEXTS, width), jnp.float32),
    "texts_kind": ((batch, TEXTS), jnp.int32),
    "teacher_txts": ((batch, TEXTS, teacher), teacher_dtype),
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
  teachers: Sequence[int] = (),
) -> dict[str, Any]:
  """The costs of one loss and way to form the logits, for value and gradients together.

  Args:
    name: of the loss.
    way: to form the logits.
    mesh: of real devices, or of those of a topology.
    batch: number B of pairs, over the whole mesh.
    width: E of the embeddings.
    samples: number of images, and of texts, for losses with per-sample state; 0: the batch.
    dtype: of communicated features and of the products.
    options: of the loss; None: its defaults, or options that fit the batch.
    teachers: widths of the teachers' embeddings, which are then bfloat16; (): one teacher, as wide
      as the embeddings, float32.

  Returns:
    "needs", "state_bytes" (over all devices); per device "temporary_bytes", "wire_bytes"
    (communicated, by kind), "flops", or "error" if the program does not fit into memory.
  """
  if options is None:
    options = BATCH_OPTIONS.get(name, lambda batch: {})(batch)
  loss = make_loss({name: dict(options)})
  sizes: dict[str, Any] = {"image": samples or batch, "text": samples or batch, "embed": width}
  sizes |= {"teachers": tuple(teachers)} if teachers else {}
  params, state = jax.eval_shape(lambda: loss.init(sizes))
  names = {"zimg", "ztxt", *(name for need in loss.needs for name in PROVIDES[need])}
  names |= {"mask_txt"} if "tokens" in loss.needs else set()
  shapes = fields(batch, width, teachers, "bfloat16" if teachers else "float32")
  abstract = {name: x for name, x in shapes.items() if name in names}

  def value(params: Any, feats: Any, state: Any, rest: Any) -> Any:
    context = first_context(pairwise.Engine(way, dtype), sizes=sizes)
    objective, (after, _) = loss.apply(params, state, {**rest, **feats}, rest, context)
    return objective, after

  def sharded(x: Any, spec: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec)

  rows = sharding.batch_sharding(mesh)
  params = jax.tree.map(lambda x: sharded(x, sharding.replicated_sharding(mesh)), params)
  state = jax.tree.map(lambda x: sharded(x, tables.state_sharding(x, mesh)), state)
  feats = {k: sharded(x, rows) for k, x in abstract.items() if k.startswith(LEARNED)}
  rest = {k: sharded(x, rows) for k, x in abstract.items() if k not in feats}
  out_shardings = jax.tree.map(lambda x: x.sharding, ((None, state), (params, feats)))
  costs: dict[str, Any] = {
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
    traced = jax.jit(both, donate_argnums=2, out_shardings=out_shardings).trace(
      params, feats, state, rest
    )
    costs["flops"] = flops.of_jaxpr(traced.jaxpr) / mesh.size
    try:
      compiled = topologies.compile_without_cache(traced.lower())
    except jax.errors.JaxRuntimeError as error:
      if not is_out_of_memory(error):
        raise
      return {**costs, "error": str(error).splitlines()[0]}
  collectives = hlo_collectives.collectives(compiled.as_text())
  return {
    **costs,
    "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    "wire_bytes": {kind: x.bytes for kind, x in collectives.items()},
  }


def table(rows: Sequence[Mapping[str, Any]]) -> rich.table.Table:
  """The rows as a table for the terminal."""
  grid = rich.table.Table(box=rich.box.SIMPLE)
  for heading in HEADINGS:
    grid.add_column(heading, justify="left" if heading in ("loss", "way", "needs") else "right")
  for row in rows:
    grid.add_row(*cells(row))
  return grid


def cells(row: Mapping[str, Any]) -> list[str]:
  """The cells of a row, by HEADINGS; products also as multiples of B B E / devices."""
  start = [row["loss"], row["way"], " ".join(row["needs"]), _size(row["state_bytes"])]
  unit = row["batch"] ** 2 * row["width"] / row["devices"]
  products = f"{row['flops'] / 1e9:,.0f} GF = {row['flops'] / unit:.1f}"
  if "error" in row:
    return [*start, "does not fit", products, ""]
  communicated = sum(row["wire_bytes"].values())
  return [*start, _size(row["temporary_bytes"]), products, _size(communicated)]


def markdown(rows: Iterable[Sequence[str]]) -> str:
  """Rows of cells as a Markdown table."""
  aligned = ("---", "---", "---", "---:", "---:", "---:", "---:")
  return "".join(f"| {' | '.join(row)} |\n" for row in (HEADINGS, aligned, *rows))


def write_document(path: pathlib.Path, settings: str, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes rows into the Markdown document of all losses' costs, where they replace older ones.

  Raises:
    ValueError: if the document was written with other settings.
  """
  table: dict[tuple[str, str], list[str]] = {}
  if path.exists():
    text = path.read_text()
    if settings not in text:
      raise ValueError(
        f"--out={path}: the figures in it are not for {settings!r}; write a new file"
      )
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    for line in lines:
      old = [cell.strip() for cell in line.split("|")[1:-1]]
      if old[0] in LOSSES:
        table[old[0], old[1]] = old
  table |= {(row["loss"], row["way"]): cells(row) for row in rows}
  order = sorted(table, key=lambda key: (key[0], pairwise.WAYS.index(key[1])))
  path.write_text(
    "# Costs of the losses\n\n"
    "Written by `bigalign costs`; do not edit. After adding a loss, run this command with\n"
    f"`--losses=NAME`:\n\n```bash\n{settings}\n```\n\n"
    "Figures are per device, for the loss and its gradients together, except for `state`, the\n"
    "loss's state over all devices. Products are also given as multiples of B² E / devices.\n"
    "`communicated` counts the larger side of each transfer, and an all-reduce twice.\n\n"
    + markdown(table[key] for key in order)
  )


def _size(n: float) -> str:
  return f"{n / 1e6:,.1f} MB" if n else ""


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
  """The program; returns the rows that it prints."""
  args = parsers.costs().parse_args(argv)
  runtime.setup()
  names = args.losses.split(",") if args.losses else sorted(LOSSES)
  ways = args.ways.split(",") if args.ways else WAYS
  for name in names:
    checks.choose(LOSSES, name, "--losses")
  for way in ways:
    checks.known("--ways", way, pairwise.WAYS)
  held = topologies.devices(args.topology) if args.topology else jax.devices()
  mesh = sharding.make_mesh(fsdp=args.fsdp, devices=held)
  sharding.host_rows(mesh, args.batch)
  every = [*itertools.product(names, ways)]
  with progress.shown():
    rows = [
      measure(
        name,
        way,
        mesh,
        batch=args.batch,
        width=args.width,
        samples=args.samples,
        dtype=args.dtype,
      )
      for name, way in progress.track(every, "compile", len(every), unit="programs")
    ]
  where = args.topology or f"{mesh.size} x {held[0].device_kind}"
  print(f"B = {args.batch:,}, E = {args.width}, {args.dtype}, {where}; per device")
  if args.markdown:
    print(markdown(map(cells, rows)), end="")
  else:
    show(table(rows))
  if args.out:
    devices = f"--topology={args.topology}" if args.topology else f"# {where}:"
    settings = (
      f"bigalign costs {devices} --batch={args.batch} --width={args.width}"
      f" --samples={args.samples} --dtype={args.dtype} --fsdp={args.fsdp} --out={args.out.name}"
    )
    write_document(args.out, settings, rows)
  if args.json:
    write_json(args.json, rows)
  return rows


def run() -> None:
  """The program `bigalign costs`."""
  main()


if __name__ == "__main__":
  run()
