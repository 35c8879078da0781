"""``mithridate serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import options as shared
from cli.output import note


def serve(
    bundle: Annotated[Path | None, typer.Argument(help="The bundle (or MITHRIDATE_BUNDLE)")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at (default: 127.0.0.1)")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen at; 0 takes a free one (default: 8000)")] = None,
    defense: Annotated[str | None, typer.Option(help="For requests that name none (default: rmc)")] = None,
    offer: Annotated[
        list[str] | None,
        typer.Option(
            help="What requests may name; repeat, or all (default: none, rmc, webnn, deepnn; with a PRM prm, prm+rmc)"
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings")] = None,
    arch: shared.ArchOption = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... (default: cpu)")] = None,
    devices: Annotated[
        str | None, typer.Option(help="Several instead, as in cuda:0,cuda:1: an engine process each")
    ] = None,
    isolation: Annotated[
        str | None, typer.Option(help="Where the engine runs: process, or thread (default: process)")
    ] = None,
    threads: shared.ThreadsOption = None,
    bundle_root: Annotated[
        Path | None, typer.Option(help="Directory whose bundles POST /admin/bundle may put live (default: none)")
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="File of API keys, made by `mithridate keys new`")] = None,
    insecure_no_keys: Annotated[
        bool, typer.Option("--insecure-no-keys", help="Listen beyond loopback without keys, behind a proxy of your own")
    ] = False,
    max_images: Annotated[int | None, typer.Option(help="Images in one request (default: 64)")] = None,
    max_batch_images: Annotated[
        int | None, typer.Option(help="Images answered together where requests wait (default: 64)")
    ] = None,
    queue_size: Annotated[int | None, typer.Option(help="Requests admitted at once (default: 64)")] = None,
    deadline_ms: Annotated[float | None, typer.Option(help="Longest time for an answer (default: 30000)")] = None,
    drain_seconds: Annotated[
        float | None, typer.Option(help="After SIGTERM, go on serving this long, not ready (default: 0)")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="One seed for all requests; for tests only")] = None,
    page: Annotated[bool | None, typer.Option("--page/--no-page", help="The page at / (default: on)")] = None,
    page_exemplars: Annotated[
        bool | None,
        typer.Option(
            "--page-exemplars/--no-page-exemplars",
            help="Training images on the page, for callers who may explain (default: on at loopback only)",
        ),
    ] = None,
    lab: Annotated[
        bool | None,
        typer.Option("--lab/--no-lab", help="Let clients attack images on the spot: trusted ones only (default: off)"),
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error (default: info)")] = None,
    log_format: Annotated[str | None, typer.Option(help="text, or json: one object a line (default: text)")] = None,
    otel: Annotated[
        bool | None, typer.Option("--otel", help="Send OpenTelemetry traces, as the OTEL_* variables say")
    ] = None,
) -> None:
    """Serve a bundle over HTTP. Every setting is also an environment variable, MITHRIDATE_ and its name.

    Exit code 1: the engine died, or hung.
    """
    from service.server import BrokenServiceError
    from service.server import serve as run
    from service.settings import load_settings

    shared.allow_local_code(arch)
    settings = load_settings(
        config,
        bundle=bundle,
        host=host,
        port=port,
        defense=defense,
        offer=tuple(offer) if offer else None,
        arch=arch,
        device=device,
        devices=devices,
        isolation=isolation,
        threads=threads,
        bundle_root=bundle_root,
        keys_file=keys,
        insecure_no_keys=insecure_no_keys or None,
        max_images=max_images,
        max_batch_images=max_batch_images,
        queue_size=queue_size,
        deadline_ms=deadline_ms,
        drain_seconds=drain_seconds,
        seed=seed,
        page=page,
        page_exemplars=page_exemplars,
        lab=lab,
        log_level=log_level,
        log_format=log_format,
        otel=otel,
    )
    try:
        run(settings)
    except BrokenServiceError as error:
        note(f"error: {' '.join(str(error).split())}")
        raise typer.Exit(1) from error
