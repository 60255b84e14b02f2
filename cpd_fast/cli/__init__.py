"""The command ``cpd-fast``: results on stdout, talk on stderr, exit code 1 with one plain sentence on failure.

One file a subcommand; each holds a ``command`` that is thin over the Python API.
"""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.markup import escape

from cpd_fast.cli import comb, compress, doctor, report, settings
from cpd_fast.errors import CpdError

INTERRUPTED = 130  # what shells expect after Ctrl-C

app = typer.Typer(
    name="cpd-fast",
    help="Make trained vision networks physically smaller and faster.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("comb")(comb.command)
app.command("compress")(compress.command)
app.command("report")(report.command)
app.command("settings")(settings.command)
app.command("doctor")(doctor.command)


def main() -> None:
    """Entry point: our own errors become one line on stderr and exit code 1, Ctrl-C becomes 130."""
    talk = Console(stderr=True, highlight=False)
    try:
        app(standalone_mode=True)
    except CpdError as e:
        talk.print(f"[bold red]error:[/] {escape(str(e))}", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        talk.print("[bold]interrupted[/]")
        sys.exit(INTERRUPTED)
