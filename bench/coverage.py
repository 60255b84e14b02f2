"""What comb reaches on every network of the zoo, beside Torch-Pruning on the same networks: docs/coverage.md.

    python bench/coverage.py [--peer] [--only NAME ...] [--again] [--page]

Each network runs in its own process with a limit of CPU time. Results go to bench/results/coverage.json (ours) and
bench/results/coverage_peer.json (Torch-Pruning's) one by one, so a stopped run goes on where it was; docs/coverage.md
is written from both files at the end. ``--again`` forgets what is known, ``--page`` only writes the page.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = {"ours": ROOT / "bench/results/coverage.json", "peer": ROOT / "bench/results/coverage_peer.json"}
PAGE = ROOT / "docs" / "coverage.md"
LIMIT_S = 1800  # wall
CPU_S = 240
PEER_CPU_S = 60  # for pruning; the check comes after
EXACT = 1e-6
QUERY = ("query", "q_proj")

# kinds of networks, for the table of families; what is in none of these sets is a CNN
PLAIN = set("beit cait convit deepseek_vit deit eva mlp_mixer tnt vision_transformer vision_transformer_relpos".split())
PLAIN |= {"vision_transformer_sam"}
WINDOW = set("gcvit hiera mvitv2 nest pvt_v2 swin_transformer swin_transformer_v2 swin_transformer_v2_cr".split())
HYBRID = set(
    "byoanet coat cpubone crossvit csatv2 efficientvim efficientvit_mit levit lowformer maxxvit metaformer".split()
)
HYBRID |= set("mobilenetv5 mobilevit sequencer shvit tiny_vit visformer vitamin volo".split())


def kind_of(entry: dict) -> str:
    """The row of the table of families that a network counts in."""
    family = entry["family"]
    sources = {
        "hf": "transformers",
        "mmseg": "segmentation: mmsegmentation",
        "smp": "segmentation: smp decoders",
        "tvseg": "segmentation: torchvision",
        "tv": "torchvision, classification",
    }
    if entry["src"] != "timm":
        return sources[entry["src"]]
    kinds = ((PLAIN, "timm: plain ViT, mixers"), (WINDOW, "timm: window and hierarchical attention"))
    return next(
        (name for some, name in (*kinds, (HYBRID, "timm: convolution and attention")) if family in some), "timm: CNN"
    )


def ours(entry: dict) -> dict:
    """Share of parameters in prunable groups, and masked against compacted at half of every group, float64."""
    import torch

    from cpd_fast import comb, compact, masked, random_plan
    from tests.nets import relative_error
    from tests.zoo.networks import build, example_input

    model, output = build(entry)
    model, x = model.double(), example_input(entry).double()
    total = sum(p.numel() for p in model.parameters())
    start = time.process_time()
    graph = comb(model, x)
    comb_s = time.process_time() - start
    reached = {s.param for g in graph.prunable_groups for s in g.slices}
    share = sum(p.numel() for n, p in model.named_parameters() if n in reached) / total
    plan = random_plan(graph, keep=0.5, generator=torch.Generator().manual_seed(0))
    small = compact(model, graph, plan)
    total_s = time.process_time() - start
    with torch.no_grad(), masked(model, graph, plan, execution="full_width") as m:
        error = relative_error(output(m(x)), output(small(x)))
    left = sum(p.numel() for p in small.parameters()) / total
    reasons: dict[str, int] = defaultdict(int)
    for g in graph.groups:
        if not g.prunable:
            reasons[(g.reason or "").split(" (in ")[0]] += g.n_channels
    frozen = max(reasons, key=lambda r: reasons[r], default="")
    return {"share": share, "left": left, "error": error, "comb_s": comb_s, "total_s": total_s, "frozen": frozen}


def peer(entry: dict) -> dict:
    """Torch-Pruning as its README and examples use it: global group magnitude, half of the channels, rounded to 8.

    Heads are given as its ViT examples give them, and their attributes repaired afterwards alike. Its result counts as
    exact when the original network, masked with the very elements that it removed, gives the same output.
    """
    import torch
    import torch_pruning as tp

    from tests.nets import relative_error
    from tests.zoo.networks import build, example_input

    model, output = build(entry)
    model, x = model.double(), example_input(entry).double()
    total = sum(p.numel() for p in model.parameters())
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + PEER_CPU_S, resource.RLIM_INFINITY))
    start = time.process_time()
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    pruner = tp.pruner.BasePruner(model, x, importance, global_pruning=True, pruning_ratio=0.5, **_peer_options(model))
    pruner.step()
    _repair_heads(model, pruner)
    seconds = time.process_time() - start
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + CPU_S, resource.RLIM_INFINITY))
    with torch.no_grad():
        pruned = output(model(x))
    result = {"peer_left": sum(p.numel() for p in model.parameters()) / total, "peer_s": seconds}
    with contextlib.suppress(Exception):  # where the check cannot be made, it stays "runs"
        result["peer_error"] = relative_error(output(_masked_as(entry, pruner.pruning_history(), x)), pruned)
    return result


def _peer_options(model: Any) -> dict:
    from torch import nn

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    heads = {}
    for m in model.modules():
        count = getattr(m, "num_heads", getattr(m, "num_attention_heads", None))
        for name in ("qkv", *QUERY, "key", "value", "k_proj", "v_proj"):
            if isinstance(count, int) and isinstance(getattr(m, name, None), nn.Linear):
                heads[getattr(m, name)] = count
        if hasattr(m, "fused_attn"):
            m.fused_attn = False
    return {"round_to": 8, "ignored_layers": layers[-1:], "num_heads": heads}


def _repair_heads(model: Any, pruner: Any) -> None:
    """As examples/timm_models and examples/transformers of Torch-Pruning do, under today's attribute names."""
    for m in model.modules():
        layer = getattr(m, "qkv", None) or next((getattr(m, n) for n in QUERY if hasattr(m, n)), None)
        if layer not in pruner.num_heads:
            continue
        heads = pruner.num_heads[layer]
        width = layer.out_features // (3 if hasattr(m, "qkv") else 1)
        sizes = {"num_heads": heads, "num_attention_heads": heads, "head_dim": width // heads, "attn_dim": width}
        sizes |= {"attention_head_size": width // heads, "all_head_size": width}
        for name in sizes.keys() & vars(m).keys():
            setattr(m, name, sizes[name])


def _masked_as(entry: dict, history: list, x: Any) -> Any:
    """The original network's output, every element that Torch-Pruning removed set to zero.

    Its history is replayed on a copy whose parameters hold the number of each element: those left are the mask.
    Normalisations take the statistics of the channels whose weights are left.
    """
    import torch
    import torch_pruning as tp
    from torch.overrides import TorchFunctionMode

    from cpd_fast.prune.norms import MASKED
    from tests.zoo.networks import build

    numbered = build(entry)[0].double()
    _peer_options(numbered)  # without fused attention
    with torch.no_grad():
        for p in numbered.parameters():
            p.copy_(torch.arange(p.numel(), dtype=p.dtype).reshape(p.shape))
    graph = tp.DependencyGraph().build_dependency(numbered, x)
    graph.load_pruning_history(history)
    left = dict(numbered.named_parameters())
    model = build(entry)[0].double()
    _peer_options(model)
    kept: dict[int, Any] = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            mask = torch.zeros(p.numel(), dtype=torch.bool)
            mask[left[name].reshape(-1).long()] = True
            kept[id(p)] = mask.reshape(p.shape)
            p *= kept[id(p)]

    class Norms(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs, name = kwargs or {}, getattr(func, "__name__", "")
            if name in ("layer_norm", "rms_norm", "group_norm"):
                weight = args[2] if len(args) > 2 else kwargs.get("weight")
                keep = kept.get(id(weight))
                if keep is not None and not keep.all():
                    shape = (1, -1, *[1] * (args[0].dim() - 2)) if name == "group_norm" else keep.shape
                    return MASKED[name](keep.double().reshape(shape), *args, **kwargs)
            return func(*args, **kwargs)

    with torch.no_grad(), Norms():
        return model(x)


def in_process(kind: str, name: str) -> dict:
    """Run one network in a process of its own; an error becomes its last line."""
    command = [sys.executable, __file__, "--worker", kind, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {f"{kind}_failed": f"more than {LIMIT_S} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode < 0:  # killed by its CPU limit
        return {f"{kind}_failed": f"more than {PEER_CPU_S if kind == 'peer' else CPU_S} CPU s"}
    errors = [line for line in done.stderr.splitlines() if "Error" in line or "Exception" in line]
    return {f"{kind}_failed": (errors or ["no output"])[-1][:160]}


# ------------------------------------------------------------------------------------------------------------- the page
def _exact(row: dict, key: str = "error") -> bool:
    return row.get(key, 1.0) < EXACT


def _peer_cell(row: dict) -> str:
    if "peer_failed" in row:
        return "fails: " + row["peer_failed"].replace("|", "/")[:70]
    if "peer_left" not in row:
        return ""
    error = row.get("peer_error")
    what = "runs" if error is None else "exact" if error < EXACT else f"wrong ({error:.0e})"
    return f"{row['peer_left']:.1%} left, {what}" if row["peer_left"] < 0.99 else "removes nothing"


def _family_table(rows: dict[str, dict], kinds: dict[str, str]) -> list[str]:
    """A row a kind of network: ours beside Torch-Pruning's."""
    lines = [
        "| family | networks | ours: exact | median share prunable | median parameters left "
        "| Torch-Pruning: exact | runs, not exact or not checkable | fails, too slow or removes nothing |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in [*sorted(set(kinds.values())), "all"]:
        mine = [r for n, r in rows.items() if kind in ("all", kinds[n])]
        good = [r for r in mine if _exact(r)]
        share, left = (f"{median(r[k] for r in good):.1%}" if good else "" for k in ("share", "left"))
        peers = [r for r in mine if "peer_left" in r or "peer_failed" in r]
        works = [r for r in peers if r.get("peer_left", 1) < 0.99]
        exact = [r for r in works if _exact(r, "peer_error")]
        name = f"**{kind}**" if kind == "all" else kind
        lines.append(
            f"| {name} | {len(mine)} | {len(good)} | {share} | {left} "
            f"| {len(exact)} | {len(works) - len(exact)} | {len(peers) - len(works)} |"
        )
    return lines


def write_page(results: dict[str, dict], kinds: dict[str, str]) -> None:
    """docs/coverage.md: a row a kind of network, and a row a network."""
    good = [r for r in results.values() if _exact(r)]
    ran = [r for r in results.values() if r.keys() & {"share", "ours_failed"}]
    shares = [r["share"] for r in good] or [0.0]
    lines = [
        "# Coverage",
        "",
        "Written by `python bench/coverage.py`, with `--peer` for Torch-Pruning (`zoo` extra); random weights and",
        "statistics, float64,",
        "half of every prunable group removed at random. *Share*: parameters that lie in prunable groups. *Error*:",
        "largest difference of masked and compacted output, relative to the largest output. *Left*: parameters after",
        "compaction.",
        "",
        "*Torch-Pruning*: the release on PyPI on the same networks and inputs, as its README and examples use it:",
        "global group magnitude, half of the channels, `round_to=8`, heads given and their attributes repaired as in",
        f"its ViT examples, at most {PEER_CPU_S} CPU seconds. *Exact*: the original, masked with the elements that it",
        "removed and normalising over what is left, gives the output of its result; *wrong*: another output; *runs*:",
        "the comparison could not be made. An empty cell was not run.",
        "",
        f"{len(good)} of the {len(ran)} networks run compact exactly; median share {median(shares):.1%}.",
        "",
        *_family_table(results, kinds),
        "",
        "| network | family | share | left | error | comb, CPU s | most channels frozen because | Torch-Pruning |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        if "ours_failed" in r:
            cells = ["", "", "", "", r["ours_failed"].replace("|", "/")]
        elif "share" in r:
            cells = [f"{r['share']:.1%}", f"{r['left']:.1%}", f"{r['error']:.0e}", f"{r['comb_s']:.1f}", r["frozen"]]
        else:
            cells = [""] * 5
        lines.append(f"| {name} | {r['family']} | {' | '.join(cells)} | {_peer_cell(r)} |")
    PAGE.write_text("\n".join(lines) + "\n")


# ------------------------------------------------------------------------------------------------------------------ run
def _load(kind: str) -> dict[str, dict]:
    return json.loads(RESULTS[kind].read_text()) if RESULTS[kind].exists() else {}


def _save(kind: str, rows: dict[str, dict]) -> None:
    RESULTS[kind].parent.mkdir(exist_ok=True)
    part = RESULTS[kind].with_suffix(".part")
    part.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(part, RESULTS[kind])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", action="store_true", help="run Torch-Pruning instead of ours")
    parser.add_argument("--only", nargs="*", help="names of networks")
    parser.add_argument("--again", action="store_true", help="run also what has a result")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--page", action="store_true", help="only write the page from the results")
    args = parser.parse_args()
    import conftest  # noqa: F401  (lets a CUDA build of torchvision import beside a CPU torch)
    from tests.zoo.networks import ENTRIES

    if args.worker:
        kind, name = args.worker
        entry = next(e for e in ENTRIES if f"{e['src']}/{e['name']}" == name)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, resource.RLIM_INFINITY))
        print(json.dumps({"ours": ours, "peer": peer}[kind](entry)))
        return
    names = {f"{e['src']}/{e['name']}": e for e in ENTRIES}
    kind = "peer" if args.peer else "ours"
    for name, entry in names.items():
        rows = _load(kind)  # another run may have added to it
        if args.page or (args.only and entry["name"] not in args.only) or (name in rows and not args.again):
            continue
        row = in_process(kind, name)
        rows = {**_load(kind), name: row}
        _save(kind, {n: rows[n] for n in names if n in rows})
        print(name, row, file=sys.stderr, flush=True)
    merged = {
        n: {"family": e["family"]} | _load("ours").get(n, {}) | _load("peer").get(n, {}) for n, e in names.items()
    }
    write_page(merged, {n: kind_of(e) for n, e in names.items()})


if __name__ == "__main__":
    main()
