"""The methods that ``cpd.py`` compares: what prunes, when, and by what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import cpd_fast as cpd
from bench.experiments.studies import Study
from cpd_fast.presets import preset
from cpd_fast.recipes.training import adamw


@dataclass
class Prune:
    """What prunes a model: ``step`` after every backward of the first ``prune`` iterations, then ``finish``."""

    study: Study
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, closure: Callable[..., Tensor], iteration: int) -> None:
        """Nothing, for methods that prune at once."""

    def is_done(self, iteration: int) -> bool:
        return iteration >= self.study.prune

    def finish(self) -> nn.Module:
        return self.model


class InLoop(Prune):
    """``cpd.Pruner``; ``OneGroup`` may need more than ``prune`` iterations, and takes them from the fine-tuning."""

    def __init__(
        self, study: Study, model: nn.Module, optimizer: torch.optim.Optimizer, keep: float, **how: Any
    ) -> None:
        super().__init__(study, model, optimizer)
        criterion, schedule = how.pop("criterion"), how.pop("schedule")
        cap = how.pop("cap", None)
        if isinstance(schedule, cpd.Greedy):
            how["round_to"] = study.round_to
        if cap is not None:  # no layer below this share of the uniform width
            how["max_pruning_ratio"] = 1 - cap * keep**0.5
        self.pruner = cpd.Pruner(model, study.picture, cpd.Target(macs=keep), criterion, schedule, **how)

    def step(self, closure: Callable[..., Tensor], iteration: int) -> None:
        self.pruner.step(closure)

    def is_done(self, iteration: int) -> bool:
        return iteration >= self.study.prune and self.pruner.done

    def finish(self) -> nn.Module:
        return self.pruner.compact(self.optimizer)


class AtOnce(Prune):
    """A plan made before the first iteration."""

    def is_done(self, iteration: int) -> bool:
        return True

    def __init__(
        self, study: Study, model: nn.Module, optimizer: torch.optim.Optimizer, make: Callable[..., cpd.PrunePlan]
    ) -> None:
        graph = cpd.comb(model, study.picture)
        super().__init__(study, cpd.compact(model, graph, make(graph), optimizer=optimizer), optimizer)


@torch.no_grad()
def macs_of(model: nn.Module, picture: Tensor) -> int:
    """MACs of convolutions and linears by running the model: quick, and blind to who built it."""
    total, mode = 0, model.training

    def count(layer: nn.Module, _inputs: Any, out: Tensor) -> None:
        nonlocal total
        total += layer.weight.numel() * (out.shape[2] * out.shape[3] if out.dim() == 4 else 1)

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [m.register_forward_hook(count) for m in layers]
    model.eval()(picture)
    model.train(mode)
    for hook in hooks:
        hook.remove()
    return total


class TorchPruning(Prune):
    """Torch-Pruning's pruner, iterative, along the same cubic ramp to the same MACs.

    Over all layers at once, or ``per_layer``, its default: the same share of each. It replaces parameters, so the
    optimizer starts anew after every removal. Its Hessian importance is the mean square of the gradients of single
    pictures.
    """

    def __init__(
        self,
        study: Study,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        keep: float,
        events: int,
        hessian: bool,
        per_layer: bool,
    ) -> None:
        import torch_pruning as tp

        super().__init__(study, model, optimizer)
        self.keep, self.events, self.hessian = keep, events, hessian
        self.importance = tp.importance.GroupHessianImportance() if hessian else tp.importance.GroupTaylorImportance()
        self.pruner = tp.pruner.MetaPruner(
            model,
            study.picture,
            importance=self.importance,
            global_pruning=not per_layer,
            pruning_ratio=0.95,
            iterative_steps=400,
            round_to=study.round_to,
            ignored_layers=[model.classify],
        )
        self.dense = macs_of(model, study.picture)

    def step(self, closure: Callable[..., Tensor], iteration: int) -> None:
        every = self.study.prune // self.events
        if (iteration + 1) % every:
            return
        if self.hessian:  # as its documentation does it
            self.importance.zero_grad()
            for loss in closure(each=True):
                self.model.zero_grad()
                loss.backward(retain_graph=True)
                self.importance.accumulate_grad(self.model)
        share = 1 - (1 - (iteration + 1) // every / self.events) ** 3
        most = self.dense * (1 - (1 - self.keep) * share)
        while macs_of(self.model, self.study.picture) > most:
            self.pruner.step()
        self.optimizer = adamw(self.model, 1e-2)


def variants(study: Study) -> dict[str, dict[str, Any]]:
    """Arguments of ``cpd.Pruner`` by name."""

    def greedy(ramp: str = "cubic") -> cpd.Greedy:
        return cpd.Greedy(interval=study.prune // 10, steps=10, ramp=ramp)

    by_taylor: dict[str, Any] = {"criterion": cpd.Taylor(normalize_cost=False), "schedule": greedy()}
    best, uniform = preset("best", study.prune // 10, 10), {"per_cost": "macs", "cap": 0.9}
    once = cpd.Greedy(interval=8, steps=1)
    return {
        "best": best,
        "taylor, not by cost": by_taylor,
        "taylor, not by cost, groups alike": {**by_taylor, "normalize": "mean"},
        "best, linear ramp": {**best, "schedule": greedy("linear")},
        "best, cosine ramp": {**best, "schedule": greedy("cosine")},
        "best, at once": {**best, "schedule": once},
        "best, averaged scores": {**best, "score_ema": 0.5},
        "best, capped": {**best, "cap": 0.6},
        "best, near uniform": {**best, "cap": 0.9},
        "fisher/macs": {"criterion": cpd.GroupFisher(), "schedule": greedy(), "per_cost": "macs"},
        "fisher/macs, near uniform": {"criterion": cpd.GroupFisher(), "schedule": greedy(), **uniform},
        "gate hessian/macs": {"criterion": cpd.GateHessian(), "schedule": greedy(), "per_cost": "macs"},
        "gate hessian/macs, near uniform": {"criterion": cpd.GateHessian(), "schedule": greedy(), **uniform},
        "hessian trace/macs": {"criterion": cpd.HessianTrace(), "schedule": greedy(), "per_cost": "macs"},
        # the Hessian trace over all groups, along a straight line
        "published": preset("published", study.prune // 10, 10),
        # one group an event; its 50 iterations an interval would not end in time
        "released": preset("released", 1),
    }


def uniform(study: Study, graph: cpd.ChannelGraph, model: nn.Module, keep: float) -> cpd.PrunePlan:
    """The widest plan of one width for all groups that meets the MACs; channels by magnitude."""
    scores, dense = cpd.score(model, graph, criterion=cpd.Magnitude()), cpd.cost(model, study.picture).macs
    for width in torch.linspace(1, 0.02, 197).tolist():
        plan = cpd.uniform_plan(graph, scores, width, study.round_to)
        if cpd.cost(model, study.picture, plan, graph).macs <= keep * dense:
            return plan
    raise AssertionError(f"no uniform width has {keep} of the MACs")


def make(
    study: Study, method: str, model: nn.Module, optimizer: torch.optim.Optimizer, keep: float, execution: str
) -> Prune:
    if method == "uniform width":
        return AtOnce(study, model, optimizer, lambda graph: uniform(study, graph, model, keep))
    if method == "magnitude at once":
        return AtOnce(
            study,
            model,
            optimizer,
            lambda g: cpd.plan(
                g, cpd.score(model, g, criterion=cpd.Magnitude()), cpd.Target(macs=keep), study.round_to
            ),
        )
    if method.startswith("Torch-Pruning"):
        hessian, per_layer = "hessian" in method, method.endswith("per layer")
        return TorchPruning(study, model, optimizer, keep, events=10, hessian=hessian, per_layer=per_layer)
    return InLoop(study, model, optimizer, keep, execution=execution, **variants(study)[method])
