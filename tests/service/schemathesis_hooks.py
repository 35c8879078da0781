"""Bodies for schemathesis that are images, whole and damaged: it would only ever send bytes that are none.

SCHEMATHESIS_HOOKS=schemathesis_hooks, with this directory and the checkout in PYTHONPATH.
"""

from __future__ import annotations

import io
import random

import schemathesis
from hypothesis import strategies as st
from PIL import Image

from benchmarks.image_mutations import mutate, seeds


def _digit() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((8, 8), 60).save(out, format="PNG")
    return out.getvalue()


_SEEDS = [_digit(), *seeds()]
_damaged = st.builds(lambda number: mutate(_SEEDS[number % len(_SEEDS)], random.Random(number), _SEEDS), st.integers(0))
_files = st.one_of(st.just(_SEEDS[0]), st.sampled_from(_SEEDS), _damaged, st.binary(max_size=100))

for _media_type in ("image/png", "image/jpeg", "image/webp", "application/octet-stream"):
    schemathesis.openapi.media_type(_media_type, _files)
schemathesis.openapi.format("binary", _files)
