"""What torch holds of each GPU, as it is told from one process to another."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence

DeviceMemory = tuple[str, str, int]
"""A device, ``allocated`` or ``reserved``, and bytes."""


def device_memory() -> Sequence[DeviceMemory]:
    """Of this process; nothing where it does not use CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():  # asking would initialise it, which costs half a gigabyte
        return ()
    found: list[DeviceMemory] = []
    for number in range(torch.cuda.device_count()):
        found.append((f"cuda:{number}", "allocated", int(torch.cuda.memory_allocated(number))))
        found.append((f"cuda:{number}", "reserved", int(torch.cuda.memory_reserved(number))))
    return found


def together(parts: Iterable[Sequence[DeviceMemory]]) -> Sequence[DeviceMemory]:
    """What several processes hold of the same devices."""
    total: Counter[tuple[str, str]] = Counter()
    for device, kind, size in (one for part in parts for one in part):
        total[device, kind] += size
    return [(device, kind, size) for (device, kind), size in total.items()]
