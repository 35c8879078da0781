"""``mithridate verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import options as shared
from cli.output import percent, print_json, print_table, size


def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle")],
    arch: shared.ArchOption = None,
    as_json: shared.JsonOption = False,
) -> None:
    """Check every byte of a bundle, and that it can be loaded. Exit code 1: it is damaged."""
    from mithridate.bundle import Bundle
    from mithridate.defenses import Resources
    from mithridate.errors import BundleError, ModelError
    from mithridate.evaluation.card import read_card, summary
    from mithridate.models import is_factory

    opened = Bundle.open(bundle, verify=False)
    manifest = opened.manifest
    problems = list(opened.problems())
    if not problems:
        shared.allow_local_code(arch)
        try:
            if not is_factory(manifest.model.arch) or arch:  # a user's code runs only where it is named again
                Resources.load(opened, allow_factory=arch)
        except (BundleError, ModelError) as error:
            problems.append(str(error))
    card = None if problems else read_card(bundle, opened.digest)
    if as_json:
        found = card.model_dump(mode="json") if card else None
        print_json({"bundle": str(bundle), "digest": opened.digest, "problems": problems, "card": found})
    elif problems:
        print_table(f"{bundle} is damaged", ["problem"], [[problem] for problem in problems])
    else:
        total = sum(entry.bytes for entry in manifest.files.values())
        accuracies = [
            [f"base accuracy, {copy.name}", percent(copy.base_correct / manifest.dataset.images)]
            for copy in manifest.copies
        ]
        print_table(
            f"{bundle} is whole",
            ["", "value"],
            [
                ["name", manifest.name],
                ["digest", opened.digest],
                ["files", f"{len(manifest.files)}, {size(total)}"],
                ["model", manifest.model.arch],
                ["classes", str(len(manifest.classes))],
                ["exemplars", str(len(manifest.layout))],
                ["index", manifest.index],
                *(
                    [["prm", ", ".join(f"{entry.variant} ({entry.size})" for entry in manifest.prm)]]
                    if manifest.prm
                    else []
                ),
                *accuracies,
                ["card", summary(card) if card else "none: not evaluated"],
            ],
        )
    if problems:
        raise typer.Exit(1)
