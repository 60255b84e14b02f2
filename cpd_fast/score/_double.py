"""Double backward: the forward it needs, its errors in our words, and what autograd would silently drop."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from cpd_fast.errors import ScoreError
from cpd_fast.score import _conv, _norm
from cpd_fast.score.criterion import Context

_T = TypeVar("_T")


class DoubleDifferentiable(TorchFunctionMode):
    """While active, convolutions and eval-mode batch norms run as our functions where these can express the call."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for module in (_conv, _norm):
            if (result := module.call(func, args, kwargs)) is not None:
                return result
        return func(*args, **kwargs)


class NoDoubleBackwardError(ScoreError):
    """An operator of the model has no double backward."""


@contextmanager
def double_differentiable() -> Iterator[None]:
    """The forward inside has a double backward: own convolutions, attention in its explicit form."""
    with DoubleDifferentiable(), sdpa_kernel(SDPBackend.MATH):
        yield


_UNSUPPORTED = re.compile(r"derivative (?:for|of) '?([\w:.]+)'? is not implemented|trying to differentiate twice")


@contextmanager
def double_backward_errors(criterion: str) -> Iterator[None]:
    """Turn autograd's complaint about a missing double backward into ours.

    Raises:
        NoDoubleBackwardError: If an operator has no double backward.
        RuntimeError: Any other, as it came.
    """
    try:
        yield
    except RuntimeError as e:
        found = _UNSUPPORTED.search(str(e))
        if found is None or isinstance(e, ScoreError):
            raise
        op = found.group(1) or "a custom autograd.Function marked @once_differentiable"
        raise NoDoubleBackwardError(
            f"{criterion}: {op} has no double backward; use {criterion}(engine='finite_difference')"
        ) from e


def by_engine(
    context: Context, criterion: str, asked: str, engines: Mapping[str, Callable[[], Iterator[_T]]]
) -> Iterator[_T]:
    """Products by the engine asked for, or that ran before; ``context.engine`` says which and why.

    ``"auto"`` is ``"retained"``, or ``"finite_difference"`` where an operator has no double backward.
    """
    engine, why = context.engine or (asked, "asked for")
    if engine == "auto":
        exact = _exact_if_possible(context, criterion, engines["retained"]())
        if exact is not None:
            yield from exact
            return
        assert context.engine is not None
        engine, why = context.engine
    context.engine = (engine, why)
    yield from engines[engine]()


def _exact_if_possible(context: Context, criterion: str, exact: Iterator[_T]) -> Iterator[_T] | None:
    """The products by double backward, or None where an operator has none; ``context.engine`` says which and why."""
    assert context.probes.seed is not None  # drawn now: it must not be drawn again
    state = context.probes.state()
    try:
        head = next(exact)
    except NoDoubleBackwardError as e:
        context.probes.set_state(state)
        context.engine = ("finite_difference", str(e).removeprefix(f"{criterion}: ").split(";")[0])
        return None
    context.engine = ("retained", "exact, and every operator has a double backward")
    return chain([head], exact)


def refuse_dead_ends(grads: Sequence[Tensor]) -> None:
    """Raise where autograd would silently drop a second derivative.

    The gradient of a function marked ``@once_differentiable`` hangs on an error node that is connected to nothing:
    asking for the derivative with respect to parameters never reaches it, and its part would just be missing.

    Raises:
        RuntimeError: If there is such a node; in PyTorch's own words.
    """
    seen: set[Any] = set()
    todo = [g.grad_fn for g in grads]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")
        todo += [n for n, _ in node.next_functions]
