"""Out of memory: how it is recognised, what can be freed, and how a request is answered in two halves."""

from __future__ import annotations

import gc
from dataclasses import fields
from typing import Any

import torch

from mithridate.defenses import Prediction
from mithridate.errors import MithridateError

_SAID = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "std::bad_alloc",
    "CUDA error: out of memory",
    "Cuda error 2 out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""RuntimeErrors of torch and FAISS that have no type of their own: c10's CPU allocator, and the libraries below."""


class OutOfMemory(MithridateError):
    """There was not enough memory for an answer, nor for a smaller part of it: the engine ends."""

    def __init__(self, said: str) -> None:
        super().__init__(f"out of memory: {said}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what ``error`` says."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID)


def free_memory() -> None:
    """Gives back what nobody holds. Call it where the error is no longer held: its frames hold tensors."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def join(first: Prediction, second: Prediction) -> Prediction:
    """The answer for the images of both, in that order; the seconds of both."""

    def joined(one: Any, other: Any) -> Any:
        if isinstance(one, torch.Tensor):
            return torch.cat([one, other])
        if isinstance(one, tuple):
            return one + other
        if isinstance(one, dict):
            return {key: one.get(key, 0.0) + other.get(key, 0.0) for key in {**one, **other}}
        return one

    return Prediction(**{f.name: joined(getattr(first, f.name), getattr(second, f.name)) for f in fields(Prediction)})
