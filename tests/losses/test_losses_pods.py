"""Memory of the losses for a million pairs on 256 chips, compiled for them."""

from __future__ import annotations

import pytest
from helpers.tpu_compiler import needs_libtpu

from bigalign import sharding
from bigalign.plan import loss_costs, topologies

TWO = (768, 768)  # widths of two teachers


@needs_libtpu
@pytest.mark.long
@pytest.mark.parametrize(
  "name,options,teachers,megabytes",
  [
    ("clip", {}, (), 190),
    ("siglip", {}, (), 190),
    ("clip", dict(texts="uniform"), (), 300),
    ("siglip", dict(texts="texts"), (), 300),
    ("mobileclip_dr", dict(texts="per_ordinal"), TWO, 300),
  ],
  ids=str,
)
def test_temporaries_of_a_million_images(name, options, teachers, megabytes):
  """At E = 1152 in bfloat16; with several texts there are 4 of each image."""
  pod = sharding.make_mesh(devices=topologies.devices("v5e:16x16"))
  settings = dict(batch=2**20, width=1152, dtype="bfloat16", options=options, teachers=teachers)
  row = loss_costs.measure(name, "auto", pod, **settings)
  assert row["temporary_bytes"] <= megabytes * 1e6
