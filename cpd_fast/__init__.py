"""cpd_fast: prune any PyTorch vision network to a physically smaller, faster one.

    comb -> score -> plan -> (masked) train with distillation -> compact -> export

Importing the package starts no CUDA context; file formats, exporters and recipes load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cpd_fast import losses, ops
from cpd_fast.compact import compact, compose_plans
from cpd_fast.errors import CpdError
from cpd_fast.masking import attach_masks, masked
from cpd_fast.memory import fit_memory
from cpd_fast.pipeline import comb, cost
from cpd_fast.schedule import plan, random_plan, uniform_plan
from cpd_fast.score import (
    BNScale,
    Criterion,
    GateHessian,
    GroupFisher,
    HessianTrace,
    Magnitude,
    Random,
    Taylor,
    merge_scores,
    score,
)
from cpd_fast.search import Candidate, SearchResult, search
from cpd_fast.types import ChannelGraph, Cost, CoupledGroup, ParamSlice, PrunePlan, Scores, Target
from cpd_fast.version import __version__

if TYPE_CHECKING:
    from cpd_fast import recipes
    from cpd_fast.export import export_onnx, export_pt2
    from cpd_fast.pruner import Pruner
    from cpd_fast.schedule import Greedy, OneGroup
    from cpd_fast.store import load, save
    from cpd_fast.timing import LatencyTable, compare_latency, latency, plan_for_latency

_LAZY = {
    "Pruner": "pruner",
    "Greedy": "schedule",
    "OneGroup": "schedule",
    "save": "store",
    "load": "store",
    "export_onnx": "export",
    "export_pt2": "export",
    "latency": "timing",
    "compare_latency": "timing",
    "LatencyTable": "timing",
    "plan_for_latency": "timing",
    "recipes": "recipes",
}

__all__ = [
    "BNScale",
    "Candidate",
    "ChannelGraph",
    "Cost",
    "CoupledGroup",
    "CpdError",
    "Criterion",
    "Greedy",
    "GateHessian",
    "GroupFisher",
    "HessianTrace",
    "LatencyTable",
    "Magnitude",
    "OneGroup",
    "ParamSlice",
    "PrunePlan",
    "Pruner",
    "Random",
    "Scores",
    "SearchResult",
    "Target",
    "Taylor",
    "attach_masks",
    "comb",
    "compact",
    "compare_latency",
    "compose_plans",
    "cost",
    "export_onnx",
    "export_pt2",
    "fit_memory",
    "latency",
    "load",
    "losses",
    "masked",
    "merge_scores",
    "ops",
    "plan",
    "plan_for_latency",
    "random_plan",
    "recipes",
    "save",
    "score",
    "search",
    "uniform_plan",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'cpd_fast' has no attribute {name!r}")
    module = importlib.import_module(f"cpd_fast.{_LAZY[name]}")
    return module if name == "recipes" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
