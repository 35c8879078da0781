"""``mithridate keys``: the API keys of a service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.output import note, print_json, print_table

keys = typer.Typer(help="Make, list and revoke the API keys of a service.", no_args_is_help=True)

FileOption = Annotated[
    Path, typer.Option(envvar="MITHRIDATE_KEYS_FILE", help="The file that `mithridate serve --keys` reads")
]


@keys.command()
def new(
    file: FileOption,
    identity: Annotated[str, typer.Option("--id", help="What logs call its owner: letters, digits, and . _ -")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="predict, choose-defense, explain, metrics or admin; repeat (default: predict)"),
    ] = None,
    requests_per_minute: Annotated[float | None, typer.Option(help="Its allowance (default: no limit)")] = None,
    compute_seconds_per_minute: Annotated[
        float | None, typer.Option(help="Its allowance of the engine's time (default: no limit)")
    ] = None,
) -> None:
    """Make a key, print it this once, and add its hash to a file; a running service takes it up within a second."""
    from pydantic import ValidationError

    from mithridate.errors import OptionError
    from service.keys import Key, add_key, hash_key, new_key

    key = new_key()
    fields = {
        "id": identity,
        "sha256": hash_key(key).hex(),
        "scopes": scope or ["predict"],
        "requests_per_minute": requests_per_minute,
        "compute_seconds_per_minute": compute_seconds_per_minute,
    }
    try:
        entry = Key.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).removesuffix("s") if first["loc"][0] == "scopes" else str(first["loc"][0])
        raise OptionError(f"--{option.replace('_', '-')} {first['input']!r}: {first['msg']}") from error
    add_key(file, entry)
    note(f"key {identity!r}: only its hash is in {file}; this is the only time you see it")
    print(key)


@keys.command("list")
def list_keys(file: FileOption, as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False) -> None:
    """List the keys of a file: ids, scopes and allowances."""
    from service.keys import SCOPES, read_keys

    entries = read_keys(file)
    rows = [
        {
            "id": key.id,
            "scopes": [scope for scope in SCOPES if scope in key.scopes],
            "requests_per_minute": key.requests_per_minute,
            "compute_seconds_per_minute": key.compute_seconds_per_minute,
        }
        for key in entries
    ]
    if as_json:
        print_json({"keys": rows})
        return
    limits = ("requests_per_minute", "compute_seconds_per_minute")
    print_table(
        str(file),
        ["id", "scopes", "requests/min", "compute s/min"],
        [
            [key.id, ", ".join(scope for scope in SCOPES if scope in key.scopes)]
            + ["no limit" if getattr(key, name) is None else f"{getattr(key, name):g}" for name in limits]
            for key in entries
        ],
    )


@keys.command()
def revoke(file: FileOption, identity: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Take a key out of a file; a running service refuses it within a second."""
    from service.keys import remove_key

    remove_key(file, identity)
    note(f"key {identity!r} is no longer in {file}")
