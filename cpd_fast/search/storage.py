"""Where a study lives: an SQLite file that many processes may open, any database by its URL, or memory."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cpd_fast.errors import SearchError

try:
    import fcntl
except ImportError:  # not on Windows; there, the first worker should have a second's start
    fcntl = None  # type: ignore[assignment]


def storage_url(storage: str | os.PathLike[str] | None) -> str | None:
    """A file as the URL of an SQLite database; a URL as it is; None stays None."""
    if storage is None:
        return None
    text = os.fspath(storage)
    return text if "://" in text else f"sqlite:///{text}"


def open_storage(optuna: Any, url: str | None, heartbeat_s: int, grace_s: int, timeout_s: float) -> Any:
    """Optuna's storage at a URL, or in memory; see :class:`cpd_fast.search.study.Study` for the arguments."""
    if url is None:
        return optuna.storages.InMemoryStorage()
    options: dict[str, Any] = {}
    if url.startswith("sqlite"):
        options["creator"] = _sqlite(url, timeout_s)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _one_at_a_time(url):
            return optuna.storages.RDBStorage(
                url, engine_kwargs=options, heartbeat_interval=heartbeat_s, grace_period=grace_s
            )


@contextmanager
def storage_errors(optuna: Any, url: str | None) -> Iterator[None]:
    """Errors of the database as one sentence.

    Raises:
        SearchError: For every one of them.
        UnboundLocalError: For one that has nothing to do with them.
    """
    from sqlalchemy.exc import SQLAlchemyError

    kinds = (optuna.exceptions.StorageInternalError, SQLAlchemyError)
    try:
        yield
    except (*kinds, UnboundLocalError) as e:  # the last: an error while Optuna's optimize writes a result down
        chain = _chain(e)
        if not any(isinstance(c, kinds) for c in chain):
            raise
        told = [str(c.orig) for c in chain if getattr(c, "orig", None)]  # what the database itself said
        said = (told or [str(e)])[0].splitlines()[0]
        advice = (
            "another process holds it; wait for that one, or use a database server for many workers"
            if "locked" in said
            else "put it back or choose another storage"
        )
        raise SearchError(f"storage {url}: {said}; {advice}. Finished candidates are kept in it") from e
    except ImportError as e:  # of a database driver
        raise SearchError(f"storage {url}: {e}; install the driver of this database") from e


def _chain(e: BaseException | None) -> list[Any]:
    """An error and what led to it."""
    chain: list[Any] = []
    while e is not None and e not in chain:
        chain.append(e)
        e = e.__cause__ or e.__context__
    return chain


@contextmanager
def _one_at_a_time(url: str) -> Iterator[None]:
    """Workers that begin together must not create the tables of an SQLite file together."""
    from sqlalchemy.engine import make_url

    path = make_url(url).database if url.startswith("sqlite") else None
    if fcntl is None or not path or not os.path.isdir(os.path.dirname(path) or "."):
        yield
        return
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sqlite(url: str, timeout_s: float) -> Callable[[], Any]:
    """Connections of an SQLite file with a write-ahead log: a commit then costs no flush to the disk.

    A killed process loses nothing; a power cut may lose the last candidates, and leaves the file whole.
    """
    import sqlite3

    from sqlalchemy.engine import make_url

    path = make_url(url).database or ""

    def connect() -> Any:
        connection = sqlite3.connect(path, timeout=timeout_s, check_same_thread=False)
        with contextlib.suppress(sqlite3.OperationalError):  # another process is setting it at this moment
            connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        return connection

    return connect
