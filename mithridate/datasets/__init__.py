"""Labelled images from a one-line specification, as uint8 arrays: see ``load_dataset``."""

from __future__ import annotations

from mithridate.datasets.labelled import LabelledImages
from mithridate.datasets.load import load_dataset
from mithridate.datasets.spec import DatasetSpec, Split, parse_spec

__all__ = ["DatasetSpec", "LabelledImages", "Split", "load_dataset", "parse_spec"]
