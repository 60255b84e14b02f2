"""The command ``cpd-fast``: results on stdout, talk on stderr, exit code 1 with one plain sentence on failure.

One file a subcommand; each holds a ``command`` that is thin over the Python API.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from cpd_fast.cli import bench, comb, compress, doctor, export, report, settings
from cpd_fast.errors import CpdError
from cpd_fast.version import __version__

INTERRUPTED = 130  # what shells expect after Ctrl-C

app = typer.Typer(
    name="cpd-fast",
    epilog="One command: cpd-fast compress --model timm/resnet18 --data FOLDER. Completion: --install-completion.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Make trained vision networks physically smaller and faster.

    Results go to stdout, talk to stderr; --json gives results to machines.

    Exit codes: 0 done; 1 a fault of yours or of the data, in one sentence; 2 a wrong flag; 130 stopped with Ctrl-C.
    """


def _page(command: Callable[..., Any]) -> str:
    """What ``--help`` says: the docstring without what it raises, a paragraph a line."""
    text = inspect.cleandoc(command.__doc__ or "").partition("\n\nRaises:")[0]
    return "\n\n".join(" ".join(paragraph.splitlines()) for paragraph in text.split("\n\n"))


_COMMANDS: dict[str, Callable[..., Any]] = {
    "compress": compress.command,
    "resume": compress.resume,
    "report": report.command,
    "export": export.command,
    "comb": comb.command,
    "bench": bench.command,
    "settings": settings.command,
    "doctor": doctor.command,
}
for _name, _command in _COMMANDS.items():
    app.command(_name, help=_page(_command))(_command)


def main() -> None:
    """Entry point: our own errors become one line on stderr and exit code 1, Ctrl-C becomes 130."""
    talk = Console(stderr=True, highlight=False)
    try:
        app(prog_name="cpd-fast", standalone_mode=True)
    except CpdError as e:
        talk.print(f"[bold red]error:[/] {escape(str(e))}", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        talk.print("[bold]interrupted[/]")
        sys.exit(INTERRUPTED)
