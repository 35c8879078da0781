"""Deletes from an environment the CUDA files that a CPU never loads. Run it with that environment's own Python.

The package index's torch wheel is linked against CUDA, and the loader wants those libraries even where there is no
GPU. Much else comes with them: engines that cuDNN opens on first use, device code, headers, the Triton compiler.
What is needed is not listed here by name, since it changes with every release: it is what a process that has used
torch has mapped. With a CPU-only torch there is nothing to delete, and that is fine.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path

SITE = Path(sysconfig.get_path("purelib"))


def drop_triton() -> int:
    """Deletes the compiler behind ``torch.compile``, which nothing here calls; returns the bytes freed."""
    freed = 0
    for folder in (SITE / "triton", *SITE.glob("triton-*.dist-info")):
        freed += sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        shutil.rmtree(folder, ignore_errors=True)
    return freed


def drop_unmapped() -> int:
    """Deletes every file of the CUDA packages that this process has not mapped; returns the bytes freed."""
    use_torch()
    with Path("/proc/self/maps").open(encoding="utf-8") as maps:
        fields = [line.split(maxsplit=5) for line in maps]
    mapped = {Path(row[5].strip()).resolve() for row in fields if len(row) == 6}
    freed = 0
    for file in (SITE / "nvidia").rglob("*"):
        if file.is_file() and file.resolve() not in mapped and "license" not in file.name.lower():
            freed += file.stat().st_size
            file.unlink()
    return freed


def use_torch() -> None:
    """Loads what the service loads and runs a step of each kind of arithmetic that it does."""
    import torch
    import torchvision

    model = torchvision.models.resnet18(num_classes=2)
    loss = model(torch.rand(2, 3, 32, 32)).sum()
    loss.backward()
    torch.optim.Adam(model.parameters()).step()
    torch.linalg.solve(torch.eye(3), torch.ones(3))
    torch.func.vmap(torch.func.grad(lambda x: (x**2).sum()))(torch.ones(2, 3))
    torch.fft.fft(torch.ones(4))


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        use_torch()
    else:
        total = drop_triton() + drop_unmapped()
        sys.stdout.write(f"dropped {total >> 20} MiB\n")
