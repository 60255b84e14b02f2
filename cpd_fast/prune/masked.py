"""Masks: a plan applied to a full-size model, so that it computes what the compacted one will."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn

from cpd_fast.errors import CompactError, PlanError
from cpd_fast.prune.execution import CompactExecution, Execution, Structure, places_of
from cpd_fast.prune.full_width import FullWidthExecution
from cpd_fast.prune.hold import Hold
from cpd_fast.types import ChannelGraph, PrunePlan

Structures = Callable[[PrunePlan], Structure]
EXECUTIONS = ("auto", "compact", "full_width")


class MaskHandle:
    """Masks on a model: forwards run as if the removed channels did not exist.

    Two executions exist. *Compact*: for the duration of a forward the model's own modules hold the kept elements of
    their tensors and the sizes of the compacted model, so that activations stay compact from layer to layer and
    removed channels cost nothing. *Full width*: parameters are multiplied by masks and normalisations count kept
    channels only; shapes stay. Between forwards the model is as it was, with the very same parameters. Gradients of
    removed weights are exactly zero, and what optimizers would do to them is undone.

    Args:
        model: The model that ``graph`` was combed from.
        graph: Its coupled channel groups.
        plan: First plan; without one nothing is masked yet.
        structures: Finds the structure of a plan, for compact execution.
        execution: ``"auto"``: compact where it is possible; ``"compact"``: an error where it is not; ``"full_width"``.
        regrow: Let optimizers move masked weights, for schemes that bring channels back.
    """

    dropped_by_compaction = True  # a compacted copy of a masked model has nothing left to mask

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        plan: PrunePlan | None = None,
        structures: Structures | None = None,
        execution: str = "auto",
        regrow: bool = False,
    ) -> None:
        if execution not in EXECUTIONS:
            raise PlanError(f"execution={execution!r}: expected one of {', '.join(EXECUTIONS)}")
        self.graph = graph
        self.plan = PrunePlan({}, graph.fingerprint)
        self._model, self._structures, self._wanted, self._regrow = model, structures, execution, regrow
        self._attached = False
        self._bind()
        if plan is not None:
            self.update(plan)

    def _bind(self) -> None:
        """Find the tensors in the model."""
        self._places = places_of(self._model, self.graph, self.graph.tensors)
        self._names = {id(m): n for n, m in self._model.named_modules()}
        self._compact: CompactExecution | None = None
        self._full: FullWidthExecution | None = None
        self._running: Execution | None = None
        self._runner = ""  # the module whose forward, during a backward, was put in place
        self._watching = False
        self._hold = None if self._regrow else Hold()
        self._why = ""
        self._last = ""
        self._caching = False

    # -------------------------------------------------------------------------------------------------------- plans
    def update(self, plan: PrunePlan) -> None:
        """Replace the plan. Weights are never touched, so any plan can follow any other.

        Raises:
            PlanError: If the plan does not fit the graph, or a forward is running.
            CompactError: If ``execution="compact"`` and the plan cannot be run so.
        """
        plan.check(self.graph)
        if self._running is not None:
            raise PlanError("the plan was changed inside a forward of the masked model; change it between forwards")
        compact, why = None, "asked for"
        if self._wanted != "full_width":
            compact, why = self._compacted(plan)
        full = None
        if compact is None:
            full = self._at_full_width(plan)
        self._compact, self._full, self._why, self.plan = compact, full, why, plan
        if self._hold is not None:
            self._hold.update(self._held())

    def _compacted(self, plan: PrunePlan) -> tuple[CompactExecution | None, str]:
        """Compact execution, or why it is not possible.

        Raises:
            CompactError: If it was asked for.
        """
        if self.graph.alive(plan).all():
            return None, "nothing is masked"
        if self.graph.needs_hooks:
            why = "the forward relies on hooks of its own"
        elif self._structures is None:
            why = "made without the structures of compacted models; use cpd_fast.masked"
        else:
            try:
                structure = self._structures(plan)
                return CompactExecution(self._model, self.graph, self._places, structure), ""
            except CompactError as e:
                why = str(e)
        if self._wanted == "compact":
            raise CompactError(f"execution='compact' is not possible: {why}", "")
        return None, why

    def _at_full_width(self, plan: PrunePlan) -> FullWidthExecution:
        return FullWidthExecution(self._model, self.graph, self._places, self.graph.alive(plan))

    def _held(self) -> dict[str, Any]:
        """Parameters that lose something, and what is kept of them."""
        execution = self._compact if self._compact is not None else self._full
        assert execution is not None
        return {
            s.name: (s.places[0].owner[s.places[0].key], kept)
            for s in execution.stands
            if s.is_parameter and (kept := execution.kept(s.name)) is not None
        }

    @property
    def execution(self) -> str:
        """How forwards run: ``"compact"`` or ``"full_width"``."""
        return "full_width" if self._compact is None else "compact"

    def explain(self) -> str:
        """How forwards run, and why so; and the last one, where it ran otherwise."""
        if self._compact is None:
            said = f"full width: {self._why}"
        else:
            said = f"compact activations: structure {getattr(self._structures, 'proof', 'given')}"
            if self._compact.grouped:
                said += f"; ops.grouped_conv2d picks the kernel of {len(self._compact.grouped)} grouped convolutions"
        return f"{said}; the last forward ran at full width: {self._last}" if self._last else said

    # ----------------------------------------------------------------------------------------------------- forwards
    def enter(self) -> None:
        """Put masked tensors in place (start of a forward).

        Raises:
            PlanError: If a forward of this model is running already.
        """
        if self._running is not None:
            if not self._runner:
                raise PlanError("the masked model was called inside its own forward; call it once at a time")
            return
        execution: Execution | None = self._compact
        self._last = ""
        if execution is not None and execution.changes and _sees_original_shapes():
            self._last = "a mode of the caller's looks at the original shapes"
            execution = None
        if execution is None:
            if self._full is None:
                self._full = self._at_full_width(self.plan)
            execution = self._full
        if not execution.changes:
            return
        if not self._watching and (torch.is_grad_enabled() or execution.sites is not None):
            self._watch()
        if self._caching and execution.taken is None:
            execution.taken = {}
        execution.enter()
        self._running, self._runner = execution, ""

    @contextmanager
    def cached_weights(self) -> Iterator[None]:
        """Take masked weights out once a plan, not once a forward; see :meth:`MaskedModel.cached_weights`."""
        before, self._caching = self._caching, True
        try:
            yield
        finally:
            self._caching = before
            if not before:
                for execution in (self._compact, self._full):
                    if execution is not None:
                        execution.taken = None

    def leave(self) -> None:
        """Put the tensors back (end of a forward, also one that raised)."""
        running, self._running = self._running, None
        if running is not None:
            running.leave()

    def attach(self) -> MaskHandle:
        """Mask every call of the model itself from now on."""
        if not self._attached:
            self._attached = True
            self._model.register_forward_pre_hook(self._before, prepend=True)
            self._model.register_forward_hook(self._after, always_call=True)
        return self

    def remove(self) -> None:
        """Take the masks off; the model computes what it did before."""
        self.leave()
        self._attached = self._watching = False
        for module in self._model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [k for k, h in hooks.items() if getattr(h, "__self__", None) is self]:
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
        if self._hold is not None:
            self._hold.update({})

    def _before(self, _module: nn.Module, _args: Any) -> None:
        self.enter()

    def _after(self, _module: nn.Module, _args: Any, _out: Any) -> None:
        if not self._runner:
            self.leave()

    def _watch(self) -> None:
        """Hooks on every module, which stay while masks live: norms by module, and forwards within a backward."""
        self._watching = True
        for name, module in self._model.named_modules():
            if name:
                module.register_forward_pre_hook(self._module_before)
                module.register_forward_hook(self._module_after, always_call=True)

    def _module_before(self, module: nn.Module, _args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self._running is not None:
            if self._running.sites is not None:
                self._running.sites.stack.append(self._names[id(module)])
        elif torch._C._current_graph_task_id() != -1:  # an activation checkpoint computes a part of a forward again
            execution: Execution | None = self._full if self._compact is None or self._last else self._compact
            if execution is not None and execution.changes:
                self._runner = self._names[id(module)]
                execution.again(self._runner)
                self._running = execution

    def _module_after(self, module: nn.Module, _args: Any, _out: Any) -> None:
        if torch.compiler.is_compiling() or self._running is None:
            return
        if self._runner and self._runner == self._names[id(module)]:
            self._runner = ""
            self.leave()
        elif self._running.sites is not None:
            self._running.sites.stack.pop()

    # ------------------------------------------------------------------------------------------------------- copies
    def __deepcopy__(self, memo: dict[int, Any]) -> MaskHandle:
        """Masks on the copy of the model; the graph is shared."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(_Unbound(self, copy.deepcopy(self._model, memo)).__dict__)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return _Unbound(self, self._model).__dict__

    def __getattr__(self, name: str) -> Any:
        """A copy finds its tensors when it is first used: its model is not complete before.

        Raises:
            AttributeError: If there is no such attribute.
        """
        if name.startswith("__") or "_plan_to_come" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        plan, watching = self.__dict__.pop("_plan_to_come")
        self._bind()
        self.update(plan)
        self._watching = watching
        return getattr(self, name)


class _Unbound:
    """What a copy of a handle starts from."""

    def __init__(self, handle: MaskHandle, model: nn.Module) -> None:
        watching = bool(handle.__dict__.get("_watching"))
        self.graph, self.plan = handle.graph, handle.plan
        self._model, self._structures = model, handle._structures
        self._wanted, self._regrow, self._attached = handle._wanted, handle._regrow, handle._attached
        self._plan_to_come = handle.__dict__.get("_plan_to_come", (handle.plan, watching))


def _sees_original_shapes() -> bool:
    """Whether a mode of the caller's knows activations by their original shapes (gates of a scoring criterion)."""
    return any(
        getattr(torch._C._get_function_stack_at(i), "sees_original_shapes", False)
        for i in range(torch._C._len_torch_function_stack())
    )


class MaskedModel(nn.Module):
    """The model seen through a plan; shares every parameter with it. Made by :func:`cpd_fast.masked`."""

    def __init__(self, model: nn.Module, handle: MaskHandle) -> None:
        super().__init__()
        self.model = model
        self._handle = handle
        self._modes = {m: m.training for m in model.modules()}
        weakref.finalize(self, handle.remove)
        self.train(model.training)

    @property
    def plan(self) -> PrunePlan:
        """The plan that is applied."""
        return self._handle.plan

    @property
    def execution(self) -> str:
        """How forwards run: ``"compact"`` or ``"full_width"``."""
        return self._handle.execution

    def update(self, plan: PrunePlan) -> None:
        """Look at the model through another plan.

        Raises:
            PlanError: If the plan does not fit the graph.
        """
        self._handle.update(plan)

    def cached_weights(self) -> AbstractContextManager[None]:
        """Take masked weights out once a plan, not once a forward, while parameters do not change.

        For evaluation over many batches. Forwards that build a graph, and buffers, are as without it. A write to a
        parameter inside the block is not seen by forwards in it until the plan changes: no write can be told from
        none (``.data`` leaves no trace), which is why there is no cache without being asked for. Like
        ``torch.nn.utils.parametrize.cached``.

        Example:
            >>> import cpd_fast as cpd
            >>> net, x = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)).eval(), torch.ones(1, 3, 2, 2)
            >>> graph = cpd.comb(net, x)
            >>> with cpd.masked(net, graph, cpd.random_plan(graph, keep=0.5)) as m, m.cached_weights():
            ...     with torch.no_grad():
            ...         outs = [m(x) for _ in range(3)]
        """
        return self._handle.cached_weights()

    def explain(self) -> str:
        """How forwards run, and why so."""
        return self._handle.explain()

    def extra_repr(self) -> str:
        """How forwards run."""
        return self.explain()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output as if the removed channels did not exist."""
        self._handle.enter()
        try:
            return self.model(*args, **kwargs)
        finally:
            self._handle.leave()

    def __enter__(self) -> MaskedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module, training in self._modes.items():
            module.training = training


def masked(model: nn.Module, graph: ChannelGraph, plan: PrunePlan) -> MaskedModel:
    """A model under masks at full width; :func:`cpd_fast.masked` runs compact activations where that is possible.

    Raises:
        PlanError: If the plan or the model does not fit the graph.
    """
    return MaskedModel(model, MaskHandle(model, graph, plan, execution="full_width"))


def attach_masks(model: nn.Module, graph: ChannelGraph, plan: PrunePlan | None = None) -> MaskHandle:
    """Masks at full width on the user's own model object; see :func:`cpd_fast.attach_masks`.

    Raises:
        PlanError: If the plan or the model does not fit the graph.
    """
    return MaskHandle(model, graph, plan, execution="full_width").attach()
