"""Calls that are given sizes: read the sizes out of their arguments, and put others in."""

from __future__ import annotations

from typing import Any

from torch import SymInt, Tensor

INTEGERS = (int, SymInt)  # torch.export and torch.compile run a forward with symbols for sizes
SIZED_CALLS = frozenset({"view", "reshape", "unflatten", "expand", "split", "split_with_sizes"})
# position in the sizes (or None: the whole list, for splits) -> size that stands there
SizeFix = dict[int, int] | list[int]


def sizes_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
    """The sizes a call is given; None where it is given none (``view(dtype)``)."""
    if not args or not isinstance(args[0], Tensor):
        return None
    where = 2 if name == "unflatten" else 1
    rest: Any = args[where:] or tuple(v for k, v in kwargs.items() if "size" in k or k == "shape")
    if name in ("split", "split_with_sizes"):
        rest = rest[0] if rest else None
        return [rest] if isinstance(rest, INTEGERS) else list(rest) if isinstance(rest, (list, tuple)) else None
    if len(rest) == 1 and isinstance(rest[0], (list, tuple)):
        rest = rest[0]
    return list(rest) if rest and all(isinstance(v, INTEGERS) for v in rest) else None


def fit(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: list[int], wanted: list[tuple[int, ...]]
) -> SizeFix | None:
    """What must change in ``sizes`` for outputs of the wanted shapes; None where nothing does or nothing helps."""
    x = args[0]
    if name in ("split", "split_with_sizes"):
        dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
        parts = [shape[dim] for shape in wanted]
        return parts if parts != sizes and sum(parts) == x.shape[dim] else None
    target = wanted[0]
    if name == "unflatten":
        dim = (args[1] if len(args) > 1 else kwargs["dim"]) % x.dim()
        target = target[dim : dim + len(sizes)]
    if len(sizes) != len(target):
        return None
    return {i: e for i, (s, e) in enumerate(zip(sizes, target, strict=True)) if s not in (-1, e)} or None


def with_sizes(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: list[int], fix: SizeFix
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with other sizes."""
    new = fix if isinstance(fix, list) else [fix.get(i, s) for i, s in enumerate(sizes)]
    if name in ("split", "split_with_sizes"):
        dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
        return (args[0], new, dim), {}
    if name == "unflatten":
        return (args[0], args[1] if len(args) > 1 else kwargs["dim"], new), {}
    return (args[0], new), {}
