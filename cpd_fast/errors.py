"""The errors a user can meet: each says what was expected, what came, where, and what to do."""


class CpdError(Exception):
    """Base of every error that cpd_fast raises on purpose."""


class ShapeError(CpdError, ValueError):
    """A tensor has another shape, dtype or device than the operation needs."""


class UnsupportedOpError(CpdError, NotImplementedError):
    """Comb met an operator without a channel rule; the message names op, module and source line."""


class TraceError(CpdError, RuntimeError):
    """The model could not be traced (data-dependent control flow, or a failing forward)."""


class ScoreError(CpdError, ValueError):
    """Scores are NaN or infinite, belong to another model, or could not be computed."""


class PlanError(CpdError, ValueError):
    """A plan does not fit the graph, or a target cannot be reached."""


class CompactError(CpdError, RuntimeError):
    """The compacted model could not be proven equal to the masked one; nothing was changed.

    ``module`` is the qualified name of the module whose forward failed, where one did.
    """

    def __init__(self, message: str, module: str | None = None) -> None:
        super().__init__(message)
        self.module = module


class DataError(CpdError, RuntimeError):
    """A data set or pretrained weight file is missing or corrupt; the message names the package to install."""


class FileFormatError(CpdError, ValueError):
    """A file is corrupt, truncated, from a future version, or belongs to another model."""


class RunFolderError(CpdError, OSError):
    """A run folder cannot be read or written (permissions, full disk, other command)."""


class MemoryLimitError(CpdError, ValueError):
    """A memory limit is none, nothing fits into it, or a batch cannot be divided so that it does."""


class SearchError(CpdError, RuntimeError):
    """A candidate search cannot start or go on: bad arguments, storage of another study, locked or gone."""


class BackendError(CpdError, RuntimeError):
    """The backend asked for cannot run this call; the message holds the reason."""


class TrainingError(CpdError, ArithmeticError):
    """Training went wrong: the loss is NaN or infinite; the message says where, and what the last checkpoint is."""
