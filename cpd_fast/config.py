"""What a compression run is asked to do: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cpd_fast.errors import CpdError, MemoryLimitError
from cpd_fast.memory import parse_bytes
from cpd_fast.presets import PRESETS
from cpd_fast.types import Target


class ConfigError(CpdError, ValueError):
    """One or more settings are wrong; the message lists every fault."""


CPD, EAGLEEYE, PRUNE_THEN_DISTILL = RECIPES = ("cpd", "eagleeye", "prune_then_distill")


TARGETS = ("target_macs", "target_params", "target_memory", "target_latency_ms")


def _range(default: Any, low: float, high: float, text: str, recipes: tuple[str, ...] = RECIPES) -> Any:
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "help": text, "recipes": recipes})


def _choice(
    default: str, choices: tuple[str, ...], text: str, recipes: tuple[str, ...] = RECIPES, before: str | None = None
) -> Any:
    """``before``: what runs did before there was a choice, where it is not the default."""
    known = {"choices": choices, "help": text, "recipes": recipes, "before": before or default}
    return dataclasses.field(default=default, metadata=known)


def _names(text: str, choices: tuple[str, ...] = ()) -> Any:
    """Names in one text, separated by commas; lists of them are taken too."""
    return dataclasses.field(default="", metadata={"names": True, "choices": choices, "help": text, "recipes": RECIPES})


def _memory(text: str) -> Any:
    """A size in bytes as a text, or nothing."""
    return dataclasses.field(default="", metadata={"memory": True, "help": text, "recipes": RECIPES})


@dataclass(frozen=True)
class CompressConfig:
    """Settings of the recipes; counts are training steps (batches). :meth:`of_recipe` says which recipe reads which.

    Raises:
        ConfigError: If values are out of range; all faults are listed at once.

    Example:
        >>> CompressConfig(teacher_steps=10).teacher_steps
        10
    """

    target_macs: float = _range(
        0.5, 1e-3, 1.0, "fraction of the multiply-accumulates that remains; 1 where another target is given alone"
    )
    target_params: float = _range(1.0, 1e-3, 1.0, "fraction of the parameters that remains; 1: no limit")
    target_memory: float = _range(1.0, 1e-3, 1.0, "fraction of the activation memory that remains; 1: no limit")
    target_latency_ms: float = _range(
        1.0, 1e-3, 1e6, "latency of one picture: a fraction of the original's, or milliseconds above 1; 1: no limit"
    )
    seed: int = _range(0, 0, 2**31 - 1, "seed of initialisation, batches and probes")
    batch_size: int = _range(16, 1, 65536, "images a step")
    teacher_steps: int = _range(200, 0, 10**7, "steps of training before pruning; 0: the model is trained already")
    teacher_lr: float = _range(1.5e-3, 0, 10, "peak learning rate of the teacher")
    prune_steps: int = _range(60, 1, 10**7, "steps under masks, with distillation", (CPD,))
    prune_events: int = _range(4, 1, 10**4, "how many times channels are scored and masked during prune_steps", (CPD,))
    finetune_steps: int = _range(80, 0, 10**7, "steps of the compacted network, with distillation")
    student_lr: float = _range(8e-4, 0, 10, "peak learning rate while pruning and fine-tuning")
    weight_decay: float = _range(1e-2, 0, 10, "of AdamW")
    round_to: int = _range(
        8, 1, 1024, "kept channels of a layer are a multiple of this; kernels are slow on odd widths"
    )
    min_channels: float = _range(
        1, 1e-3, 10**6, "fewest channels that a layer keeps; below 1: the least fraction of it"
    )
    max_pruning_ratio: float = _range(0.95, 0, 1, "largest fraction that a layer may lose")
    ignore: str = _names("modules or parameters that keep their shapes: names or patterns, separated by commas")
    freeze: str = _names("groups that stay whole, else modules or parameters: names or patterns, separated by commas")
    protect: str = _names("layers that stay whole: first, last or both, separated by a comma", ("first", "last"))
    granularity: str = _choice("dim", ("dim", "head"), "a channel of an attention: a dim of each head, or a head")
    conv_groups: str = _choice(
        "channel", ("channel", "group"), "a channel of a grouped convolution: one of each conv group, or a conv group"
    )
    on_unknown: str = _choice(
        "error", ("error", "freeze"), "at an operator without a channel rule: stop, or keep all channels it touches"
    )
    preset: str = _choice(
        "events", ("events", *PRESETS),
        "how channels are removed; events: scored on a few batches, prune_events times; else a preset of cpd.Pruner, "
        "which gathers importance over all prune_steps", (CPD,),
    )  # fmt: skip
    criterion: str = _choice(
        "GateHessian", ("GateHessian", "HessianTrace", "GroupFisher", "Taylor"),
        "what channels are scored by in events", (CPD,), before="HessianTrace",
    )  # fmt: skip
    num_probes: int = _range(1, 1, 10**4, "Rademacher probes a batch, of HessianTrace and GateHessian", (CPD,))
    score_batches: int = _range(4, 1, 10**5, "batches that each scoring looks at", (CPD,))
    tau: float = _range(1.0, 1e-3, 1e3, "temperature of the distillation loss", (CPD, EAGLEEYE))
    distill_weight: float = _range(
        3.0, 0, 1e4, "weight of the distillation loss beside the task's own", (CPD, EAGLEEYE)
    )
    search_ratios: int = _range(
        0, 0, 1, "1: a search picks how many channels each group keeps; 0: one ranking over all groups", (CPD,)
    )
    candidates: int = _range(100, 1, 10**6, "plans that the search evaluates", (CPD, EAGLEEYE))
    calibration_batches: int = _range(19, 1, 10**5, "batches of adaptive batch norm", (CPD, EAGLEEYE))
    search_images: int = _range(2500, 1, 10**7, "pictures of the val split that rank a candidate", (CPD, EAGLEEYE))
    prune_teacher: int = _range(
        0, 0, 1, "1: the teacher's weights are pruned in rounds first; 0: the teacher as it is", (CPD, EAGLEEYE)
    )
    rounds: int = _range(4, 1, 100, "rounds of pruning the teacher's weights; each takes a fifth")
    round_steps: int = _range(100, 1, 10**7, "steps of training after each round")
    alpha: float = _range(0.95, 0, 1, "share of the teacher in the student's loss", (PRUNE_THEN_DISTILL,))
    kd_temperature: float = _range(10.0, 1e-3, 1e3, "temperature of the student's loss", (PRUNE_THEN_DISTILL,))
    inherit: int = _range(
        0, 0, 1, "1: the student starts from the pruned teacher's weights; 0: from scratch", (PRUNE_THEN_DISTILL,)
    )
    device: str = _choice("auto", ("auto", "cpu", "cuda"), "where it trains; auto: the GPU, where there is one")
    precision: str = _choice("fp32", ("fp32", "fp16"), "of training; fp16: autocast with scaled losses")
    memory_limit: str = _memory("most memory a training step may take, e.g. 10GiB; default: what a GPU has free")
    latency_backend: str = _choice(
        "auto", ("auto", "onnxruntime", "eager"),
        "what latency is measured in; auto: ONNX Runtime, on the GPU of training unless the target limits latency",
    )  # fmt: skip
    # with more threads, those that wait for each other on a busy machine are what is measured
    latency_threads: int = _range(1, 1, 1024, "CPU threads that latency is measured with")
    latency_runs: int = _range(1000, 1, 10**6, "timed forwards of each network")
    checkpoint_every: int = _range(20, 1, 10**6, "steps between checkpoints")

    def __post_init__(self) -> None:
        faults = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.metadata.get("names") and isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
                value = ",".join(value)
                object.__setattr__(self, f.name, value)
            text_fault = _memory_fault if "memory" in f.metadata else _text_fault
            fault = text_fault(f, value) if isinstance(f.default, str) else _number_fault(f, value)
            if fault:
                faults.append(f"{f.name}={value!r}: expected {fault}")
        if faults:
            raise ConfigError("; ".join(faults))

    def target(self) -> Target:
        """What may remain: the limits that are set.

        Example:
            >>> CompressConfig(target_macs=1.0, target_latency_ms=0.6).target().given
            {'latency_ms': 0.6}
        """
        limits = {name.removeprefix("target_"): getattr(self, name) for name in TARGETS}
        return Target(**({k: v for k, v in limits.items() if v != 1} or {"macs": 1.0}))

    def listed(self, name: str) -> tuple[str, ...]:
        """The names in a setting that holds several.

        Example:
            >>> CompressConfig(protect="first, last").listed("protect")
            ('first', 'last')
        """
        return _split(getattr(self, name))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> CompressConfig:
        """Build from names and values, e.g. of a YAML file.

        Raises:
            ConfigError: If a name is unknown or a value out of range.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = [k for k in settings if k not in known]
        if unknown:
            hints = {k: difflib.get_close_matches(str(k), known, n=1) for k in unknown}
            raise ConfigError(
                "; ".join(f"{k}: no such setting" + (f", did you mean {h[0]}?" if h else "") for k, h in hints.items())
                + f" (settings: {', '.join(known)})"
            )
        return cls(**settings)

    def as_dict(self) -> dict[str, Any]:
        """Names and values."""
        return dataclasses.asdict(self)

    def of_recipe(self, recipe: str) -> dict[str, Any]:
        """Names and values of the settings that a recipe reads."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if recipe in f.metadata["recipes"]}


def before_choice() -> dict[str, Any]:
    """What a run folder without a setting was made with: what runs did before the setting existed.

    Example:
        >>> before_choice()["latency_threads"]
        1
    """
    return {f.name: f.metadata.get("before", f.default) for f in dataclasses.fields(CompressConfig)}


def _split(text: str) -> tuple[str, ...]:
    return tuple(v.strip() for v in text.split(",") if v.strip())


def _number_fault(f: dataclasses.Field[Any], value: Any) -> str | None:
    """What was expected, where a value is no number of its field."""
    low, high = f.metadata["low"], f.metadata["high"]
    kinds = (int,) if isinstance(f.default, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        return f"a {'whole number' if kinds == (int,) else 'number'} from {low:g} to {high:g}"
    return None


def _memory_fault(_f: dataclasses.Field[Any], value: Any) -> str | None:
    """What was expected, where a value is no size."""
    try:
        if value != "":
            parse_bytes(value)
    except MemoryLimitError:
        return "bytes, e.g. 10GiB"
    return None


def _text_fault(f: dataclasses.Field[Any], value: Any) -> str | None:
    """What was expected, where a value is no text of its field."""
    many, choices = f.metadata.get("names", False), f.metadata["choices"]
    if not isinstance(value, str):
        return "names separated by commas, or a list of them" if many else f"one of {', '.join(choices)}"
    if choices and not set(_split(value) if many else [value]) <= set(choices):
        return f"{'some' if many else 'one'} of {', '.join(choices)}"
    return None


# what differs from the defaults for the built-in tasks; measured on two cores, see docs
CLASSIFICATION: Mapping[str, Any] = {
    "batch_size": 128,
    "teacher_steps": 430,  # one epoch
    "teacher_lr": 4e-3,
    "prune_steps": 160,
    "finetune_steps": 270,
    "student_lr": 2e-3,
    "tau": 4.0,
    "distill_weight": 1.0,
    "checkpoint_every": 100,
    "round_steps": 215,
}
