"""A folder that a run can be killed in at any moment and continued from: atomic files, one checkpoint, one owner."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from cpd_fast.config import before_choice
from cpd_fast.errors import FileFormatError, RunFolderError
from cpd_fast.store import pack_tensors, read_tensors, write_atomically

try:
    import fcntl
except ImportError:  # not on Windows; there, two runs in one folder are not noticed
    fcntl = None  # type: ignore[assignment]

CHECKPOINT = "checkpoint.safetensors"
CHOICE = "auto.json"  # which recipe auto chose, and why
CHECKPOINT_KIND, CHECKPOINT_VERSION = "cpd_fast.checkpoint", 1


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the run in a folder was asked to do.

    Raises:
        RunFolderError: If there is no run, or its settings are damaged.
    """
    file = Path(path) / "run.json"
    if not file.is_file():
        raise RunFolderError(f"{path}: holds no run.json; it is no run folder")
    try:
        made = dict(json.loads(file.read_text())["settings"])
        return {**before_choice(), **made} if "recipe" in made else made
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise RunFolderError(f"{path}: run.json is damaged ({e!r}); start the run anew in another folder") from e


class RunFolder:
    """The files of one run.

    Every file is written to ``NAME.part``, flushed to the disk and renamed, so that a reader meets the old contents or
    the new ones and nothing else. The folder is locked while it is open; the lock dies with the process.

    Args:
        path: The folder; created if it does not exist.
        settings: What the run was asked to do, JSON-able. A folder belongs to one set of settings for good.
        command: What asked for it. ``folder.command`` is that of the first time: what resumed a run does not repeat it.

    Raises:
        RunFolderError: If the folder cannot be written, is in use, or belongs to other settings (says which).

    Example:
        >>> import tempfile, torch
        >>> with RunFolder(tempfile.mkdtemp(), {"seed": 0}) as run:
        ...     run.save_checkpoint("teacher", 3, {"w": torch.ones(2)}, {"loss": [0.5]})
        ...     stage, step, tensors, state = run.load_checkpoint()
        >>> stage, step, tensors["w"].tolist(), state
        ('teacher', 3, [1.0, 1.0], {'loss': [0.5]})
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any], command: str = "") -> None:
        self.path = Path(path)
        self.command = command
        self._lock: int | None = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            raise self.error("cannot be written", e) from e
        try:
            self._take_lock()
            self._check_settings(json.loads(json.dumps(dict(settings))))
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> None:
        if fcntl is None:
            return
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise RunFolderError(
                f"{self.path}: another process is running in this folder; wait for it or choose another --run-dir"
            ) from e

    def _check_settings(self, settings: dict[str, Any]) -> None:
        """Compare with the settings that the folder was made with, or write them.

        Settings that did not exist by then count as what runs did before.

        Raises:
            RunFolderError: If they differ, or the folder holds something else.
        """
        if (self.path / "run.json").exists():
            doc = self.read_json("run.json")
            self.command = str(doc.get("command", self.command))
            made = doc.get("settings", {})
            made = {**{k: v for k, v in before_choice().items() if k in settings}, **made}
            differ = [k for k in {**made, **settings} if made.get(k) != settings.get(k)]
            if differ:
                parts = [f"{k}: it has {made.get(k)!r}, this command asks for {settings.get(k)!r}" for k in differ]
                raise RunFolderError(
                    f"{self.path}: was made with other settings ({'; '.join(parts)}); "
                    "use the same settings to resume, or another --run-dir"
                )
            return
        strangers = [p.name for p in self.path.iterdir() if p.name not in (".lock", "run.json.part")]
        if strangers:
            raise RunFolderError(
                f"{self.path}: is not empty and no run folder (it holds {', '.join(sorted(strangers)[:3])}); "
                "choose another --run-dir"
            )
        self.write("run.json", json.dumps({"settings": settings, "command": self.command}, indent=1))

    def write(self, name: str, data: str | bytes) -> Path:
        """Write one file in full or not at all.

        Raises:
            RunFolderError: If the folder is read-only or full; what was there before is still there.
        """
        path = self.path / name
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, data.encode() if isinstance(data, str) else data)
        except OSError as e:
            raise self.error(f"{name} cannot be written", e) from e
        return path

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON object.

        Raises:
            RunFolderError: If the file cannot be read or is none.
        """
        try:
            doc = json.loads((self.path / name).read_text())
        except OSError as e:
            raise self.error(f"{name} cannot be read", e) from e
        except (ValueError, RecursionError) as e:
            raise RunFolderError(f"{self.path}: {name} is no JSON ({e}); delete the folder to start over") from e
        if not isinstance(doc, dict):
            raise RunFolderError(f"{self.path}: {name} is no JSON object; delete the folder to start over")
        return doc

    def save_checkpoint(self, stage: str, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Replace the checkpoint: where the run is, and everything it needs to go on from there.

        Raises:
            RunFolderError: If it cannot be written; the checkpoint before is still there.
        """
        head = {"stage": stage, "step": step, "state": dict(state)}
        self.write(CHECKPOINT, pack_tensors(tensors, head, CHECKPOINT_KIND, CHECKPOINT_VERSION))

    def load_checkpoint(self) -> tuple[str, int, dict[str, Tensor], dict[str, Any]] | None:
        """Stage, step, tensors and state of the last checkpoint; None when there is none yet.

        Raises:
            RunFolderError: If the checkpoint is corrupt.
        """
        path = self.path / CHECKPOINT
        if not path.exists():
            return None
        try:
            tensors, head = read_tensors(path, CHECKPOINT_KIND, CHECKPOINT_VERSION)
            return str(head["stage"]), int(head["step"]), tensors, dict(head["state"])
        except (FileFormatError, KeyError, TypeError, ValueError) as e:
            raise RunFolderError(f"{e}; delete {path} to start this run over") from e

    def error(self, what: str, e: OSError) -> RunFolderError:
        """The error for a failed read or write, with what to do about it."""
        advice = {
            errno.ENOSPC: "free some space and run the same command again, it continues from the last checkpoint",
            errno.EDQUOT: "free some quota and run the same command again, it continues from the last checkpoint",
            errno.EROFS: "choose another --run-dir",
            errno.EACCES: "change its permissions or choose another --run-dir",
        }.get(e.errno or 0, "choose another --run-dir, or mend it and run the same command again")
        return RunFolderError(f"{self.path}: {what}: {e.strerror or e}; {advice}")

    def close(self) -> None:
        """Release the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
