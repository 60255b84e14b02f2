"""What a run says while it works: progress bars on a terminal, a few lines elsewhere. Always on stderr."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Talk:
    """Progress of a run, for people.

    Args:
        console: Where to; default stderr.
        quiet: Say nothing at all.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, quiet=quiet, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]left[/]"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self._quiet = quiet

    def __enter__(self) -> Talk:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """One line."""
        if not self._quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Iterator[Bar]:
        """A progress bar; outside of terminals a line now and then."""
        bar = Bar(self, title, total, done)
        try:
            yield bar
        finally:
            bar.close()


class Bar:
    """One progress bar of a :class:`Talk`."""

    def __init__(self, talk: Talk, title: str, total: int, done: int) -> None:
        self._talk, self._title, self._total, self._done = talk, title, total, done
        self._start = self._said = time.monotonic()
        self._note = ""
        self._task: TaskID = talk._bars.add_task(title, total=total, completed=done, note="")

    def advance(self, count: int = 1, note: str = "") -> None:
        """Move on by ``count``."""
        self._done += count
        self._note = note or self._note
        self._talk._bars.update(self._task, advance=count, note=self._note)
        if time.monotonic() - self._said > 10:  # keeps logs of CI short and alive
            self._line()

    def close(self) -> None:
        """The stage is over."""
        self._line()

    def _line(self) -> None:
        self._said = time.monotonic()
        if not self._talk.console.is_terminal:
            seconds = self._said - self._start
            self._talk.say(f"{self._title:<28} {self._done}/{self._total}  {seconds:5.1f} s  {self._note}".rstrip())


class StopRequest:
    """Ctrl-C that waits for the end of a training step, so that a checkpoint can be written; a second one does not.

    Outside of :meth:`polite` sections Ctrl-C interrupts at once, as ever.
    """

    def __init__(self) -> None:
        self._asked = False
        self._polite = False
        self._before: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._polite or self._asked:
            raise KeyboardInterrupt
        self._asked = True
        os.write(2, b"\nStopping after this step (Ctrl-C again: at once) ...\n")  # print is not safe in a handler

    @contextmanager
    def polite(self) -> Iterator[None]:
        """Inside, Ctrl-C only sets :attr:`asked`."""
        self._polite = True
        try:
            yield
        finally:
            self._polite = False

    @property
    def asked(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._asked
