"""What every criterion is: a source of observations, one number a channel each, whose mean is the score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from cpd_fast.errors import ScoreError
from cpd_fast.memory import Closure
from cpd_fast.score._layout import Layout
from cpd_fast.score._moments import Moments
from cpd_fast.score._probes import Probes
from cpd_fast.types import ChannelGraph, PrunePlan, Scores

if TYPE_CHECKING:
    from cpd_fast.score._finite import Step
    from cpd_fast.score._in_training import InTraining


@dataclass
class _Masks:
    """What a plan leaves of each parameter; made when first asked for."""

    ready: bool = False
    kept: dict[str, Tensor] = field(default_factory=dict)
    elements: Tensor | None = None


class Context:
    """A model seen through its channel graph: the parameters that channels own, and sums over them.

    Args:
        model: The model that the graph was combed from (or a copy of the same structure).
        graph: Its channel graph.
        generator: Source of probes; ``None`` is a fresh one on the CPU with seed 0.
        plan: The plan under which the model runs, where it is masked.

    Raises:
        ScoreError: If the model lacks a parameter of the graph, has another shape, or no channel owns a parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        generator: torch.Generator | None = None,
        plan: PrunePlan | None = None,
    ) -> None:
        self.model, self.graph = model, graph
        self._plan, self._masks = plan, _Masks()
        self.generator = generator if generator is not None else torch.Generator().manual_seed(0)
        self.probes = Probes(self.generator)
        self.samples: int | None = None  # of the (micro-)batch at hand, where that is known
        self.info: dict[str, Any] = {}  # for scores.info
        own = dict(model.named_parameters(remove_duplicate=False))
        self.params: dict[str, nn.Parameter] = {}
        for name in dict.fromkeys(s.param for g in graph.groups for s in g.slices):
            described = graph.tensors[name]
            if not described.is_parameter:
                continue
            if name not in own:
                raise ScoreError(f"graph of another model: the model has no parameter {name}; comb this model")
            if tuple(own[name].shape) != tuple(described.shape):
                raise ScoreError(
                    f"graph of another model: {name} has shape {tuple(own[name].shape)}, the graph expects "
                    f"{tuple(described.shape)}; comb this model"
                )
            self.params[name] = own[name]
        if not self.params:
            raise ScoreError("no channel owns a parameter of this model: there is nothing to score")
        self.layout = Layout(graph, self.params)
        self.graph_is_checked = False  # HessianTrace: the autograd graph has no dead ends
        self.engine: tuple[str, str] | None = None  # second order: which engine runs, and why
        self.step: Step | None = None  # HessianTrace: of finite differences

    @property
    def plan(self) -> PrunePlan | None:
        """The plan under which the model runs; set it when the masks change."""
        return self._plan

    @plan.setter
    def plan(self, plan: PrunePlan | None) -> None:
        self._plan, self._masks = plan, _Masks()

    def _mask(self) -> _Masks:
        if not self._masks.ready:
            ones = {n: torch.ones((), device=w.device).expand(w.shape) for n, w in self.params.items()}
            if self._plan:
                alive = torch.from_numpy(self.graph.alive(self._plan))
                for name, w in self.params.items():
                    maps = [alive[torch.from_numpy(m)] for m in self.graph.tensors[name].maps]
                    if not all(bool(m.all()) for m in maps):
                        keep = maps[0]
                        for m in maps[1:]:
                            keep = keep & m
                        self._masks.kept[name] = keep.to(w.device, w.dtype)
                        ones[name] = self._masks.kept[name].expand(w.shape)
            self._masks.elements = self.layout.cells(self.layout.reduce(ones)).clamp(min=1)
            self._masks.ready = True
        return self._masks

    @property
    def weights(self) -> dict[str, Tensor]:
        """The scored parameters by name, detached; zero where the plan removed them."""
        kept = self._mask().kept
        return {n: w.detach() * kept[n] if n in kept else w.detach() for n, w in self.params.items()}

    @property
    def kept(self) -> Mapping[str, Tensor]:
        """1 where a parameter remains under the plan, else 0, in a shape that expands to its own; cut ones only."""
        return self._mask().kept

    @property
    def elements(self) -> Tensor:
        """How many remaining parameters each channel owns of each slice, at least 1: ``(n_cells,)``."""
        elements = self._mask().elements
        assert elements is not None
        return elements

    @property
    def tensors(self) -> list[nn.Parameter]:
        """The scored parameters, in a fixed order."""
        return list(self.params.values())

    @property
    def cuda_devices(self) -> list[int]:
        """Where the scored parameters lie, if on GPUs."""
        return sorted({t.device.index for t in self.tensors if t.device.type == "cuda"})

    def refuse_unused(self, gradients: Sequence[Tensor | None]) -> None:
        """Raise if no scored parameter has a gradient.

        Raises:
            ScoreError: If the loss depends on none of them.
        """
        if all(g is None for g in gradients):
            raise ScoreError(
                f"the loss depends on none of the {len(self.params)} scored parameters "
                f"({next(iter(self.params))} ...): it must be computed with the model that is passed to loss_fn"
            )

    def moments(self) -> Moments:
        """An empty accumulator for this graph."""
        return Moments(self.graph.n_channels, self.layout.device)

    def by_name(self, values: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
        """Values in the order of :attr:`tensors`, by parameter name."""
        return dict(zip(self.params, values, strict=True))

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector over all channels by group name."""
        return {g.name: vector[g.offset : g.offset + g.n_channels] for g in self.graph.groups}


class Criterion(ABC):
    """One way to say how important a channel is.

    A subclass yields *observations*, ``(graph.n_channels,)`` by global channel id, larger = keep; their running mean is
    the score, their spread its standard error. It keeps no state of its own, so one object can serve many models.

    Attributes:
        data: What it needs: ``"nothing"`` but the weights, ``"gradients"`` of an ordinary training step, or the
            ``"loss"`` itself as a function that it may call.
        normalize: How :func:`cpd_fast.plan` makes its groups comparable: ``"none"`` where scores are in units of the
            loss.
    """

    data: ClassVar[str] = "loss"
    normalize: ClassVar[str] = "none"

    @abstractmethod
    def observe(self, context: Context, closure: Closure | None) -> Iterator[Tensor]:
        """Yield observations for one batch; ``closure()`` is its loss, built with the model."""

    def from_gradients(self, context: Context, gradients: Mapping[str, Tensor | None]) -> Tensor:
        """One observation from the gradients of a training step, ``None`` where a parameter has none.

        Raises:
            ScoreError: If this criterion needs more than gradients.
        """
        raise ScoreError(
            f"{type(self).__name__} cannot be computed from the gradients of a training step; call "
            "pruner.step(closure) with a closure that returns the loss, or use Taylor()"
        )

    def in_training(self, context: Context) -> InTraining:
        """What runs the backward passes of training with a second one beside each, for ``Pruner.backward``.

        Raises:
            ScoreError: If this criterion cannot be had so.
        """
        raise ScoreError(
            f"{type(self).__name__} looks at the loss in eval mode and cannot use the gradients of a training step: "
            "call loss.backward() and pruner.step(closure), or use HessianTrace()"
        )

    def seeded(self) -> torch.Generator | None:
        """The user's generator, where the criterion has one."""
        return getattr(self, "generator", None)

    def finish(self, context: Context, moments: Moments) -> Scores:
        """Turn the observations into scores.

        Raises:
            ScoreError: If there were none, or a parameter's values were not finite (it is named).
        """
        bad = context.layout.bad_parameter()
        count = int(moments.count)
        if bad is not None and (count == 0 or not bool(torch.isfinite(moments.mean).all())):
            raise ScoreError(
                f"{type(self).__name__}: values of parameter {bad} are not finite; check the loss and the batches for "
                "NaN, or lower the loss scale"
            )
        if count == 0:
            raise ScoreError(f"{type(self).__name__}: no batches; give at least one")
        spread, values = moments.stderr, context.split(moments.mean)
        info: dict[str, Any] = {
            "observations": count,
            "batches": int(moments.batches),
            "normalize": self.normalize,
            **context.info,
            **self.information(context, moments),
        }
        if self.is_magnitude:  # what merge_scores needs
            info["signed_means"] = {k: v.float().cpu() for k, v in values.items()}
            values = {k: v.abs() for k, v in values.items()}
        return Scores(
            values,
            criterion=repr(self),
            fingerprint=context.graph.fingerprint,
            stderr=None if spread is None else {k: v.float().cpu() for k, v in context.split(spread).items()},
            info=info,
        )

    def enough(self, batch: Moments, taken: int) -> bool:
        """Whether a batch needs no more than the ``taken`` observations that it gave."""
        return False

    def finished(self, moments: Moments) -> bool:
        """Whether no more batches are needed."""
        return False

    def information(self, context: Context, moments: Moments) -> dict[str, object]:
        """What ``scores.info`` says beside the counts: the engine and why, where there is a choice."""
        return {} if context.engine is None else dict(zip(("engine", "engine_reason"), context.engine, strict=True))

    @property
    def is_magnitude(self) -> bool:
        """Whether the score is the magnitude of the mean of the observations, and not the mean itself."""
        return False


def first_gradients(
    context: Context, closure: Closure, create_graph: bool = False, scale: float = 1.0
) -> tuple[Tensor | None, ...]:
    """Gradients of a checked loss (times ``scale``) for the scored parameters; ``.grad`` is not touched."""
    loss = checked(closure())
    loss = loss if scale == 1 else loss * scale
    grads = torch.autograd.grad(loss, context.tensors, create_graph=create_graph, allow_unused=True)
    context.refuse_unused(grads)
    return grads


def checked(loss: Tensor, finite: bool = True) -> Tensor:
    """The loss, if it is one.

    Raises:
        ScoreError: If it is not a scalar tensor with a graph, or not ``finite`` where that is asked for.
    """
    if not isinstance(loss, Tensor):
        raise ScoreError(f"the loss must be a scalar tensor, got {type(loss).__name__}; return the loss from loss_fn")
    if loss.numel() != 1:
        raise ScoreError(f"the loss must be a scalar, got shape {tuple(loss.shape)}; take its mean")
    if not loss.requires_grad:
        raise ScoreError(
            "the loss has no graph: it does not depend on any parameter; compute it with this model, outside "
            "torch.no_grad() and without .item() or .detach()"
        )
    if finite and not isinstance(loss, FakeTensor) and not bool(torch.isfinite(loss.detach()).all()):
        raise ScoreError(f"the loss is {float(loss.detach()):g}; check the batch for NaN or lower the learning rate")
    return loss.reshape(())


@contextmanager
def quiet(context: Context) -> Iterator[None]:
    """Eval mode, gradients for every scored parameter, private global RNG; all as before afterwards."""
    modes = [(m, m.training) for m in context.model.modules()]
    frozen = [p for p in context.tensors if not p.requires_grad]
    devices = sorted({p.device.index for p in context.model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            context.model.eval()
            for p in frozen:
                p.requires_grad_(True)
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
        for m, training in modes:
            m.training = training
