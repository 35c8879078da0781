"""The ``mithridate`` command. Nothing heavy is imported here: ``--help`` must be quick."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import NoReturn, cast

import typer

from cli.attack import attack
from cli.bench import bench
from cli.build import build
from cli.demo import demo
from cli.evaluate import evaluate
from cli.inspect import inspect
from cli.keys import keys
from cli.load import load
from cli.predict import predict
from cli.serve import serve
from cli.train import train
from cli.verify import verify
from mithridate import __version__
from mithridate.errors import MithridateError

# The base of all errors in how a command was written; typer does not export it.
UsageError = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])

# Read when torch's thread pool is loaded: how long its threads spin before they sleep. By default that is so long that
# everything becomes tens of times slower once something else wants the cores (measured on 2 cores: 91 ms for a forward
# pass of 2 ms); if they never spin, waking them costs more than a small adaptation (21 ms instead of 6).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

app = typer.Typer(
    name="mithridate",
    help="Serve an image classifier behind run-time adversarial defences, and measure what they are worth.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: loading rich would cost more than everything else
    pretty_exceptions_enable=False,
)
for command in (train, build, verify, serve, predict, attack, evaluate, load, bench, demo):
    app.command()(command)
app.add_typer(inspect, name="inspect")
app.add_typer(keys, name="keys")


def _version(asked: bool) -> None:
    if asked:
        print(f"mithridate {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Serve an image classifier behind run-time adversarial defences, and measure what they are worth."""


def run() -> None:
    """Exit codes: 0 done, 1 it ran and the answer is no, 2 unusable input (one line on stderr), 130 interrupted."""
    try:
        # Not app(): typer's own main turns interruptions and a closed pipe into silent exits.
        command = typer.main.get_command(app)
        with command.make_context("mithridate", sys.argv[1:]) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a command without any argument: its help, as it is
            print(error.format_message(), file=sys.stderr)
            sys.exit(2)
        _fail(error.format_message())
    except MithridateError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as in `mithridate ... | head`
        _silence_stdout()
    except OSError as error:  # a file that may not be read, a disk that is full: said in one line whatever it was
        _silence_stdout()
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    sys.exit(0)


def _silence_stdout() -> None:
    """Python flushes stdout at its end; what cannot be written must not fail there again."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
