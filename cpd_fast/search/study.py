"""The engine of a search: an Optuna study that many processes may work on, and any may leave at any moment.

Optuna keeps *trials*; a search counts *candidates*. They differ where a worker died: its trial is failed by whoever
notices that its heartbeat has stopped, and a retry with the same candidate is queued in its place. A candidate is
therefore an original trial together with its retries. Every trial that ends on purpose says so in its ``record``; one
that failed without a record belongs to a dead worker.
"""

from __future__ import annotations

import datetime
import logging
import math
import os
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpd_fast.errors import SearchError
from cpd_fast.search.storage import open_storage, storage_errors, storage_url
from cpd_fast.search.trials import RECORD, RETRY_OF, WORKER, counts, families, originals, record_of, slots_of

SAMPLERS = ("random", "tpe", "cmaes", "nsga2")
PRUNERS = ("median", "halving", "hyperband")
FINGERPRINT = "cpd_fast"  # user attribute of the study
MOST_RETRIES = 3  # a candidate that kills its worker this often more is given up
MOST_COPIES = 50  # in a row: the space has no more plans
POLL_S = 0.2

Report = Callable[[float], None]
Objective = Callable[
    [int, tuple[float, ...], float, Report, dict[int, tuple[int, ...]]], tuple[tuple[float, ...], dict[str, Any]]
]


After = Callable[[int, float | None], None]


@dataclass
class _Done:
    """How a trial of this process ended."""

    outcome: str = "died"
    candidate: int = -1
    value: float | None = None


class Copy(Exception):
    """The candidate is one that was evaluated already."""


class Surplus(Exception):
    """The study has all the candidates it needs."""


def optuna() -> Any:
    """The optuna package.

    Raises:
        SearchError: If it is not installed.
    """
    try:
        import optuna
    except ImportError as e:
        raise SearchError("search needs Optuna, which is not installed; install it with: pip install optuna") from e
    return optuna


class Study:
    """A search's study.

    Args:
        storage: File of an SQLite database, URL of any database that Optuna can use, or None: in memory.
        name: Of the study in its storage.
        fingerprint: What the study is about, JSON-able; a study of something else is refused.
        names: Names of the knobs.
        lowest: Smallest value of each; the largest is 1.
        sampler: One of ``SAMPLERS``.
        pruner: One of ``PRUNERS`` or None.
        seed: Of the sampler.
        worker: What this process is called in the records.
        shrinks: Add a knob ``"width"`` in (0, 1], for two objectives.
        heartbeat_s: Seconds between the signs of life of a running trial; after three times that it counts as dead.
        storage_timeout_s: How long to wait for a locked SQLite file.

    Raises:
        SearchError: If sampler or pruner are unknown, Optuna is missing, the storage cannot be used, or its study is
            of another model.
    """

    def __init__(
        self,
        storage: str | os.PathLike[str] | None,
        name: str,
        fingerprint: Mapping[str, Any],
        names: Sequence[str],
        lowest: Sequence[float],
        *,
        sampler: str = "random",
        pruner: str | None = None,
        seed: int = 0,
        worker: str = "",
        heartbeat_s: int = 10,
        storage_timeout_s: float = 60.0,
    ) -> None:
        if sampler not in SAMPLERS:
            raise SearchError(f"sampler={sampler!r}: expected one of {', '.join(SAMPLERS)}")
        if pruner is not None and pruner not in PRUNERS:
            raise SearchError(f"pruner={pruner!r}: expected None or one of {', '.join(PRUNERS)}")
        if pruner is not None and sampler == "nsga2":
            raise SearchError("pruner: candidates of two objectives (nsga2) cannot be stopped early; leave it out")
        self._optuna = optuna()
        self._optuna.logging.get_logger("optuna").setLevel(logging.ERROR)  # failures are kept and reported by us
        self.url = storage_url(storage)
        self._names, self._lowest = tuple(names), tuple(lowest)
        self._sampler, self._seed, self._worker = sampler, seed, worker or f"process {os.getpid()}"
        self._two = sampler == "nsga2"
        self._grace_s = 3 * heartbeat_s
        with storage_errors(self._optuna, self.url):
            self._storage = open_storage(self._optuna, self.url, heartbeat_s, self._grace_s, storage_timeout_s)
            self._study = self._optuna.create_study(
                storage=self._storage,
                study_name=name,
                directions=["maximize", "minimize"] if self._two else ["maximize"],
                pruner=self._make_pruner(pruner),
                sampler=self._make_sampler(0),
                load_if_exists=True,
            )
            self._claim(dict(fingerprint))

    def _claim(self, fingerprint: dict[str, Any]) -> None:
        """Write the fingerprint into a new study, or compare it.

        Raises:
            SearchError: If the study is about something else.
        """
        if FINGERPRINT not in self._study.user_attrs:
            is_used = bool(self._study.get_trials(deepcopy=False))
            if is_used and FINGERPRINT not in self._study.user_attrs:  # nobody has claimed it in between
                raise SearchError(f"{self.where}: was not made by cpd_fast; choose another study_name or storage")
            if not is_used:
                self._study.set_user_attr(FINGERPRINT, fingerprint)
        known = self._study.user_attrs[FINGERPRINT]
        differ = [k for k in {**known, **fingerprint} if known.get(k) != fingerprint.get(k)]
        if differ:
            parts = [f"{k}: it has {known.get(k)}, this search has {fingerprint.get(k)}" for k in differ]
            raise SearchError(
                f"{self.where}: is of another search ({'; '.join(parts)}); choose another study_name or storage"
            )

    @property
    def where(self) -> str:
        """Name and storage, for messages."""
        return f"study {self._study.study_name!r} in {self.url or 'memory'}"

    # -------------------------------------------------------------------------------------------------------- work
    def run(
        self,
        number: int,
        objective: Objective,
        deadline: float | None = None,
        alone: bool = False,
        after: After | None = None,
    ) -> None:
        """Evaluate candidates until the study has ``number`` of them, by whomever.

        Args:
            number: How many.
            objective: Called with the candidate's number, its ratios, its width, a function that reports the value so
                far, and the counts of the candidates there are, by number; returns value(s) and what to record. Raises
                :class:`Copy` for a candidate that exists, ``TrialPruned`` for a hopeless one, and anything else for
                one that failed.
            deadline: ``time.monotonic()`` after which no further candidate begins.
            alone: No other process works on this study: what is running was left behind.
            after: Called with number and value (None: failed or stopped) after every candidate of this process.

        Raises:
            SearchError: If the storage fails.
        """
        with storage_errors(self._optuna, self.url):
            if alone:
                for t in self._trials():
                    if not t.state.is_finished() and t.state.name == "RUNNING":
                        self._fail(t)
            copies = 0
            while deadline is None or time.monotonic() < deadline:
                trials = self._trials()
                if self._mend(trials):
                    continue
                if len(originals(trials)) >= number and not any(t.state.name == "WAITING" for t in trials):
                    if not any(t.state.name == "RUNNING" for t in trials):
                        return
                    time.sleep(POLL_S)
                    self._fail_stale(trials)
                    continue
                if copies >= MOST_COPIES:
                    return
                done = self._one(number, objective, len(trials))
                copies = copies + 1 if done.outcome == "copy" else 0
                if after is not None and done.outcome in ("done", "failed", "stopped"):
                    after(done.candidate, done.value)

    def _one(self, number: int, objective: Objective, n_trials: int) -> _Done:
        """Ask for one trial and evaluate it.

        Raises:
            ValueError: If Optuna refuses what it is told.
        """
        done = _Done()

        def evaluate(trial: Any) -> Any:
            trial.set_user_attr(WORKER, self._worker)
            record: dict[str, Any] = {}
            began = time.monotonic()
            try:
                trials = self._trials()
                self._refuse_surplus(trial, trials, number)
                done.candidate = slots_of(trials)[trial.user_attrs.get(RETRY_OF, trial.number)]
                if self._sampler == "random":
                    self._study.sampler.candidate = done.candidate
                ratios = tuple(
                    trial.suggest_float(n, low, 1.0) for n, low in zip(self._names, self._lowest, strict=True)
                )
                width = trial.suggest_float("width", 0.2, 1.0) if self._two else 1.0
                values, record = objective(done.candidate, ratios, width, self._reporter(trial), self._known(trials))
                done.outcome, done.value = "done", values[0]
                return values if self._two else values[0]
            except (Copy, Surplus) as e:
                done.outcome = type(e).__name__.lower()
                raise
            except self._optuna.TrialPruned as e:
                done.outcome, record = "stopped", dict(getattr(e, "record", {}))
                raise
            except Exception as e:
                done.outcome, record = (
                    "failed",
                    {"error": f"{type(e).__name__}: {e}"[:2000], **getattr(e, "record", {})},
                )
                raise
            finally:
                if done.outcome != "died":
                    seconds = round(time.monotonic() - began, 4)
                    trial.set_user_attr(RECORD, {"outcome": done.outcome, "seconds": seconds, **record})

        self._study.sampler = self._make_sampler(n_trials)
        try:
            self._study.optimize(evaluate, n_trials=1, catch=(Exception,))
        except (self._optuna.exceptions.UpdateFinishedTrialError, ValueError) as e:
            if isinstance(e, ValueError) and "Cannot tell" not in str(e):
                raise
            done.outcome = "late"  # we were taken for dead; a retry counts in our place
        return done

    def draw(self, candidate: int) -> tuple[float, ...] | None:
        """The ratios of a candidate where they follow from its number (the random sampler); None otherwise."""
        if self._sampler != "random":
            return None
        return tuple(
            _drawn(self._seed, candidate, n, low, 1.0) for n, low in zip(self._names, self._lowest, strict=True)
        )

    def _known(self, trials: list[Any]) -> dict[int, tuple[int, ...]]:
        """The counts of the candidates that have been evaluated, by number."""
        slots = slots_of(trials)
        return {
            slots[t.user_attrs.get(RETRY_OF, t.number)]: tuple(record_of(t)["counts"])
            for t in trials
            if record_of(t).get("counts") and t.user_attrs.get(RETRY_OF, t.number) in slots
        }

    def _reporter(self, trial: Any) -> Report:
        steps = iter(range(10**9))

        def report(value: float) -> None:
            trial.report(value, next(steps))
            if trial.should_prune():
                raise self._optuna.TrialPruned

        return report

    def _refuse_surplus(self, trial: Any, trials: list[Any], number: int) -> None:
        """Several workers may ask for the last candidate at once: the first ``number`` originals are in.

        Raises:
            Surplus: If this trial is not needed.
        """
        origin = trial.user_attrs.get(RETRY_OF)
        if origin is None:
            if sum(t.number < trial.number for t in originals(trials)) >= number:
                raise Surplus
        else:  # two workers may have mended the same candidate
            family = [t for t in trials if t.user_attrs.get(RETRY_OF) == origin and t.number != trial.number]
            if any(counts(t) or (not t.state.is_finished() and t.number < trial.number) for t in family):
                raise Surplus

    # ------------------------------------------------------------------------------------------------ dead workers
    def _mend(self, trials: list[Any]) -> bool:
        """Queue a retry for every candidate whose worker died; True if there was one."""
        create = self._optuna.trial.create_trial
        mended = False
        for family in families(trials).values():
            last = family[-1]
            is_open = any(counts(t) or not t.state.is_finished() for t in family)
            if is_open or len(family) > MOST_RETRIES:
                continue
            self._study.add_trial(
                create(
                    state=self._optuna.trial.TrialState.WAITING,
                    params=last.params,
                    distributions=last.distributions,
                    user_attrs={RETRY_OF: family[0].number},
                )
            )
            mended = True
        return mended

    def _fail_stale(self, trials: list[Any]) -> None:
        """Fail trials whose worker shows no sign of life (``optimize`` does the same before every trial)."""
        if self.url is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._optuna.storages.fail_stale_trials(self._study)
        now = datetime.datetime.now()
        for t in trials:  # dead before its first heartbeat
            started = t.datetime_start
            if t.state.name == "RUNNING" and WORKER not in t.user_attrs and started is not None:
                if (now - started).total_seconds() > self._grace_s:
                    self._fail(t)

    def _fail(self, t: Any) -> None:
        try:
            self._storage.set_trial_state_values(t._trial_id, state=self._optuna.trial.TrialState.FAIL)
        except (self._optuna.exceptions.UpdateFinishedTrialError, RuntimeError):
            pass  # somebody else did

    # ------------------------------------------------------------------------------------------------------ results
    def candidates(self) -> list[tuple[int, Any]]:
        """One ``(number, trial that counts)`` a candidate, by number; the trial is the last where none counts.

        Raises:
            SearchError: If the storage fails.
        """
        with storage_errors(self._optuna, self.url):
            trials = self._trials()
        found = []
        for family in families(trials).values():
            counted = sorted((t for t in family if counts(t)), key=lambda t: (t.state.name != "COMPLETE", t.number))
            found.append((slots_of(trials)[family[0].number], counted[0] if counted else family[-1]))
        return sorted(found, key=lambda pair: pair[0])

    def _trials(self) -> list[Any]:
        return self._study.get_trials(deepcopy=False)

    # ------------------------------------------------------------------------------------------------------ choices
    def _make_sampler(self, n_trials: int) -> Any:
        """A sampler whose random numbers depend on the seed and on how far the study is, not on who asks.

        Raises:
            SearchError: If its package is missing.
        """
        if self._sampler == "random":
            return _numbered_sampler(self._optuna)(self._seed)
        others = any(t.state.name == "RUNNING" for t in self._trials()) if n_trials else False
        seed = int(np.random.SeedSequence([self._seed, n_trials, os.getpid() if others else 0]).generate_state(1)[0])
        samplers = self._optuna.samplers
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self._sampler == "tpe":
                return samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
            if self._sampler == "nsga2":
                return samplers.NSGAIISampler(seed=seed, population_size=20)
            try:
                return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
            except ImportError as e:
                raise SearchError("sampler='cmaes' needs the package cmaes; install it with: pip install cmaes") from e

    def _make_pruner(self, pruner: str | None) -> Any:
        pruners = self._optuna.pruners
        if pruner == "median":
            return pruners.MedianPruner(n_startup_trials=5)
        if pruner == "halving":
            return pruners.SuccessiveHalvingPruner()
        if pruner == "hyperband":
            return pruners.HyperbandPruner()
        return pruners.NopPruner()


# -------------------------------------------------------------------------------------------------------------- parts
def _drawn(seed: int, candidate: int, name: str, low: float, high: float) -> float:
    rng = np.random.default_rng([seed, candidate, zlib.crc32(name.encode())])
    return float(low + (high - low) * rng.random())


def _numbered_sampler(optuna: Any) -> Any:
    """A random sampler whose candidate number n is the same for every worker, and after every restart."""

    class NumberedRandomSampler(optuna.samplers.BaseSampler):  # type: ignore[misc, name-defined]
        def __init__(self, seed: int) -> None:
            self._seed = seed
            self.candidate = 0

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            return {}

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> float:
            low, high = param_distribution.low, param_distribution.high
            return _drawn(self._seed, self.candidate, param_name, low, high)

    return NumberedRandomSampler


def check_value(value: Any) -> float:
    """A number that a candidate can be ranked by.

    Raises:
        SearchError: If it is none.
    """
    try:
        number = float(value)
    except (TypeError, ValueError) as e:
        raise SearchError(
            f"evaluate returned {type(value).__name__}; expected a finite number, larger is better"
        ) from e
    if not math.isfinite(number):
        raise SearchError(f"evaluate returned {number}; expected a finite number, larger is better")
    return number
