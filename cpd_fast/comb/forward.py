"""One forward of a meta clone under a tracer, with the calls that are seen before they are taken apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as shapes_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves

from cpd_fast.comb.calls import RULES, AttentionSite, Call
from cpd_fast.comb.leaves import leaves
from cpd_fast.comb.meta import clear_caches
from cpd_fast.comb.planes import State
from cpd_fast.comb.quick import function_shape, quick_call
from cpd_fast.comb.sizes import SIZED_CALLS, sizes_of
from cpd_fast.comb.stack import module_stack
from cpd_fast.comb.trace import Tracer
from cpd_fast.comb.training import reads_noticed
from cpd_fast.comb.values import CHECKS, OF_NUMBERS


class _FunctionWatcher(TorchFunctionMode):
    """Sees calls before they are taken apart: attention that follows head_dim with its scale, composite norms."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tracer = self.tracer
        if func is torch.nn.functional.scaled_dot_product_attention:
            if kwargs.get("scale") is None and (len(args) < 7 or args[6] is None):
                q = args[0] if args else kwargs["query"]
                tracer.attention.append(AttentionSite(tracer.module, tracer.attended[-1], tracer.state(q)))
            tracer.attended = [n + 1 for n in tracer.attended]
        name = getattr(func, "__name__", "")
        if tracer.is_suspended:
            return func(*args, **kwargs)
        if name in ("tolist", "numpy") and (value := tracer.values.of(args[0])) is not None:
            return func(value)
        if name in SIZED_CALLS and (sizes := sizes_of(name, args, kwargs)) is not None:
            args, kwargs = tracer.resize(name, args, kwargs, sizes)
            tracer.sized = [n + 1 for n in tracer.sized]
            out = func(*args, **kwargs)
            parts = [out] if isinstance(out, Tensor) else out
            for part in parts:
                tracer.step(Call(name, (), {"parts": len(parts)}, part), part, tracer.state(part))
            return out
        call = tracer.numbers[tracer.module, name]
        tracer.numbers[tracer.module, name] += 1
        outer, tracer.function = tracer.function, (name, call)
        try:
            if name in OF_NUMBERS:
                out = func(*args, **kwargs)
                tracer.values.made_of(out, args[OF_NUMBERS[name]] if len(args) > OF_NUMBERS[name] else None)
                return out
            if name in CHECKS:
                out = func(*args, **kwargs)
                if tracer.values.of(out) is None:
                    tracer.values.fill(out, CHECKS[name])
                return out
            if f"function.{name}" not in RULES:
                quick = quick_call(func, args, kwargs)
                if quick is None or tracer.values.bears_on(quick):
                    return func(*args, **kwargs)
                tracer.apply(quick, [quick.out])
                return quick.out
            with tracer.suspended():
                out = function_shape(name, args, kwargs)
                if out is None:
                    out = func(*args, **kwargs)
            done = Call(name, tuple(args), kwargs, out)
            outs = [o for o in leaves(out) if isinstance(o, Tensor)]
            result = RULES[f"function.{name}"](tracer, done)
            tracer.finish(done, outs, result if isinstance(result, list) else [result] * len(outs))
            return out
        finally:
            tracer.function = outer


def run_trace(clone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tracer: Tracer) -> list[Tensor]:
    """One forward of the meta clone under the tracer; returns the tensors of its output."""
    with (
        module_stack(clone, tracer),
        reads_noticed(tracer.watch),
        sdpa_kernel(SDPBackend.MATH),
        torch.enable_grad(),
        # how many there are says nothing of channels
        shapes_config.patch(meta_nonzero_assume_all_nonzero=True),  # type: ignore[attr-defined]
        _FunctionWatcher(tracer),
    ):
        with torch.autograd.set_multithreading_enabled(False), tracer:
            for t in tree_flatten((args, kwargs))[0]:
                if isinstance(t, Tensor):
                    tracer.set_state(t, State())
            tracer.values.read_switches(clone)
            clear_caches(clone)
            try:
                out = clone(*args, **kwargs)
            finally:
                clear_caches(clone)
    outputs = [t for t in tree_leaves(_plain(out)) if isinstance(t, Tensor)]
    tracer.output_shapes = tuple(tuple(t.shape) for t in outputs)
    return outputs


def _plain(out: Any) -> Any:
    """Outputs that pytrees do not open: dataclasses and mappings of other libraries."""
    if isinstance(out, Tensor) or out is None:
        return out
    if hasattr(out, "values") and callable(out.values):
        return [_plain(v) for v in out.values()]
    if hasattr(out, "__dataclass_fields__"):
        return [_plain(getattr(out, f)) for f in out.__dataclass_fields__]
    if isinstance(out, (list, tuple)):
        return [_plain(v) for v in out]
    if hasattr(out, "__dict__"):
        return [_plain(v) for v in vars(out).values()]
    return out
