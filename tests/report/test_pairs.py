"""The pairs of a report: their captions, and the names of classes where there are no captions."""

from __future__ import annotations

import numpy as np

from bigalign.report.main import _Picked


class Source:
  fingerprint = ""
  classnames = ("ant", "bee", "cat")
  records = (
    dict(captions=("one", "two"), label=1),
    dict(captions=(), label=1),
    dict(captions=(), label=-1),
    dict(captions=(), label=7),
    dict(captions=(), label=-1, label_set=np.array([True, False, True])),
    dict(captions=(), label=-1, label_set=np.zeros(3, bool)),
  )

  def __getitem__(self, i):
    return self.records[i]


def test_a_sample_without_a_label_has_no_class_name():
  picked = _Picked(Source(), np.arange(6))
  said = [picked[i]["captions"] for i in range(6)]
  assert said == [("one",), ("bee",), (), (), ("ant, cat",), ()]
