"""Where a trace is in the module tree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cpd_fast.comb.calls import Call
from cpd_fast.comb.walk import named_modules

if TYPE_CHECKING:
    from cpd_fast.comb.trace import Tracer


@contextmanager
def module_stack(clone: nn.Module, tracer: Tracer) -> Iterator[None]:
    """Keep ``tracer.stack`` at the module whose forward runs."""
    handles = []
    for name, m in named_modules(clone):
        if getattr(m, "keeps_attention_scale", False):  # of an earlier compaction: an identity with a constant
            tracer.transparent |= {name}
        call = Call(f"call {name}", (), {}, None)

        def enter(_m: nn.Module, args: Any, kwargs: Any, name: str = name, call: Call = call) -> None:
            if name and args and isinstance(args[0], Tensor) and not tracer.is_suspended:
                with torch._C.DisableTorchFunction():
                    tracer.step(call, args[0], tracer.state(args[0]))
            tracer.stack.append(name)
            tracer.sized.append(0)
            tracer.attended.append(0)
            if tracer.watch is not None:
                tracer.watch.enter(tracer, args, kwargs)
            if name in tracer.transparent:
                tracer.is_suspended = True

        def leave(m: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            name = tracer.stack.pop()
            tracer.sized.pop()
            tracer.attended.pop()
            if name in tracer.transparent:
                tracer.is_suspended = False
                tracer.set_state(out, tracer.state(args[0]))
            keeps_scale = type(m) is nn.Identity or getattr(m, "keeps_attention_scale", False)
            if keeps_scale and isinstance(out, Tensor) and not tracer.replay:
                tracer.set_state(out, replace(tracer.state(out), identity=name))
            if tracer.watch is not None:
                tracer.watch.leave(tracer, name, m, (args, kwargs), out)

        handles.append(m.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(m.register_forward_hook(leave, with_kwargs=True))
    try:
        yield
    finally:
        for h in handles:
            h.remove()
