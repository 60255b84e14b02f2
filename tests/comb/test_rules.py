"""A tiny net for every operator in the rule table: its prunable groups by hand, and masked equals compacted."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cpd_fast import masked
from cpd_fast.comb.calls import RULES
from cpd_fast.compact import compact
from cpd_fast.pipeline import comb
from cpd_fast.schedule import random_plan
from tests.compact import test_odd_operators as odd
from tests.compact.test_odd_operators import Net, image, tokens
from tests.nets import informative, relative_error

trace = importlib.import_module("cpd_fast.comb")
aten = torch.ops.aten


def whole(f):
    """What composite operators look like in inference mode: not taken apart."""

    def run(s, x):
        with torch.inference_mode():
            y = f(s, x)
        return y.clone()

    return run


def vector(x):
    """(2, C, 8, 8) -> (2, C)."""
    return x.mean((2, 3))


def back(x):
    """(2, C) -> (2, C, 1, 1)."""
    return x[:, :, None, None]


def checked(x):
    if not (x == x)._is_all_true().item():
        raise ValueError
    return x


A = {"a": 8}
# operator -> layers between a (8 channels of an image) and o, channels that o reads, prunable groups
EXACT = {
    **{f"aten.{n}": (lambda s, x, n=n: getattr(aten, n)(x), 8, A) for n in (
        "celu", "hardsigmoid", "hardswish", "leaky_relu", "mish", "silu", "softplus")},
    "aten.rrelu": (whole(lambda s, x: F.rrelu(x)), 8, A),
    "aten.relu6": (whole(lambda s, x: aten.relu6(x)), 8, A),
    "aten.selu": (whole(lambda s, x: aten.selu(x)), 8, A),
    "aten.hardtanh": (lambda s, x: F.hardtanh(x), 8, A),
    "aten.clamp": (lambda s, x: aten.clamp(x, -0.5, 0.5), 8, A),
    "aten.threshold": (lambda s, x: aten.threshold(x, 0.1, 0.3), 8, A),
    "aten.logit": (lambda s, x: aten.logit(x.sigmoid() * 0.9 + 0.05), 8, A),
    "aten.lerp": (lambda s, x: torch.lerp(x, x.relu(), 0.3), 8, A),
    "aten.masked_fill": (lambda s, x: x.masked_fill(x > 0, 0.5), 8, A),
    "aten.where": (lambda s, x: torch.where(x > 0, x, x * 0.1), 8, A),
    "aten.fill": (lambda s, x: x * aten.fill(x, 2.0), 8, A),
    "aten.polar": (lambda s, x: torch.polar(x.abs(), x).abs(), 8, A),
    "aten._conj": (lambda s, x: (torch.complex(x, x.relu()).conj() * 2).abs(), 8, A),
    "aten.view_as_real": (lambda s, x: torch.view_as_real(torch.complex(x, x.relu())).sum(-1), 8, A),
    "aten.dropout": (whole(lambda s, x: F.dropout(x, 0.5, False)), 8, A),
    "aten.native_dropout": (lambda s, x: aten.native_dropout(x, 0.5, False)[0], 8, A),
    # made by the forward
    "aten.empty_like": (lambda s, x: x + torch.empty_like(x).zero_(), 8, A),
    "aten.new_empty": (lambda s, x: x + x.new_empty(8).zero_(), 8, A),
    "aten.uniform": (lambda s, x: x + x.clone().uniform_() * 0, 8, A),
    "aten.full": (lambda s, x: x * torch.full((1,), 2.0).to(x), 8, A),
    "aten.new_full": (lambda s, x: x * x.new_full((1,), 2.0), 8, A),
    "aten.new_ones": (lambda s, x: x + x.new_ones(x.shape[1], 1, 1), 8, A),
    "aten.full_like": (lambda s, x: x + torch.full_like(x, 2.0), 8, A),
    "aten.zero": (lambda s, x: x + x.clone().zero_(), 8, A),
    "aten.eye": (lambda s, x: x @ torch.eye(8).to(x), 8, A),
    **{f"aten.{n}": (lambda s, x, n=n: x + getattr(torch, n)(8, 8).to(x) * 0, 8, A) for n in ("rand", "randn")},
    **{f"aten.{n}_like": (lambda s, x, n=n: x + getattr(torch, f"{n}_like")(x) * 0, 8, A) for n in ("rand", "randn")},
    "aten.normal": (lambda s, x: x + x.clone().normal_() * 0, 8, A),
    "aten.randperm": (lambda s, x: x + torch.randperm(8).to(x) * 0, 8, A),
    "aten.new_empty_strided": (lambda s, x: x + x.new_empty_strided((8, 8), (8, 1)).zero_(), 8, A),
    "aten.empty_strided": (lambda s, x: x + torch.empty_strided((8, 8), (8, 1)).zero_().to(x), 8, A),
    # moved, split, joined
    "aten.chunk": (whole(lambda s, x: torch.cat(x.chunk(2, 1)[::-1], 1)), 8, A),
    "aten.unsafe_chunk": (whole(lambda s, x: torch.mul(*aten.unsafe_chunk(x, 2, 1))), 4, {"a": 4}),
    "aten.unsafe_split": (lambda s, x: torch.mul(*x.unsafe_split(x.shape[1] // 2, 1)), 4, {"a": 4}),
    "aten.concatenate": (whole(lambda s, x: torch.concatenate([x, x], 1)), 16, A),
    "aten.constant_pad_nd": (lambda s, x: aten.constant_pad_nd(x, [1, 1], 0.5), 8, A),
    "aten.reflection_pad1d": (lambda s, x: aten.reflection_pad1d(x.flatten(2), [1, 1])[..., None], 8, A),
    "aten.reflection_pad2d": (lambda s, x: aten.reflection_pad2d(x, [1, 1, 1, 1]), 8, A),
    "aten.replication_pad2d": (lambda s, x: aten.replication_pad2d(x, [1, 1, 1, 1]), 8, A),
    "aten.contiguous": (whole(lambda s, x: x.transpose(2, 3).contiguous()), 8, A),
    "aten.flatten": (whole(lambda s, x: x.flatten(2)[..., None]), 8, A),
    "aten.reshape": (whole(lambda s, x: x.reshape(2, -1, 64, 1)), 8, A),
    "aten.squeeze": (lambda s, x: x[:, :, None].squeeze(2), 8, A),
    "aten.t": (lambda s, x: back(vector(x).t().t()), 8, A),
    "aten.tile": (whole(lambda s, x: x.tile(1, 2, 1, 1)), 16, A),
    "aten.to": (whole(lambda s, x: x.to(torch.float64)), 8, A),
    "aten.narrow": (whole(lambda s, x: x.narrow(2, 1, 4)), 8, A),
    "aten.as_strided": (lambda s, x: x.contiguous().as_strided(x.shape, x.contiguous().stride()), 8, A),
    "aten.index_select": (lambda s, x: x.index_select(2, torch.tensor([3, 1])), 8, A),
    "aten._unsafe_index_put": (lambda s, x: aten._unsafe_index_put(x, [None, None, torch.tensor([1])],
                                                                   torch.tensor(0.5).to(x)), 8, A),
    "aten.scatter": (lambda s, x: x.scatter(2, torch.zeros(2, x.shape[1], 1, 8, dtype=torch.long)[:, :1].expand(
        -1, x.shape[1], -1, -1), 0.5), 8, A),
    "aten.native_channel_shuffle": (whole(lambda s, x: aten.native_channel_shuffle(x, 2)), 8, {"a": 4}),
    "aten.pixel_shuffle": (whole(lambda s, x: aten.pixel_shuffle(x, 2)), 2, {"a": 2}),
    "aten.triu": (lambda s, x: x.triu(), 8, A),
    # products
    "aten.embedding": (lambda s, x: x + image(F.embedding(torch.zeros(2, 64, dtype=torch.long), s.table)), 8, A),
    "aten._weight_norm_interface": (lambda s, x: F.conv2d(x, torch._weight_norm(s.k, s.g, 0)), 6, {"k": 6}),
    "aten.mm": (lambda s, x: back(aten.mm(vector(x), s.w)), 6, {"a": 8, "w": 6}),
    "aten.addmm": (lambda s, x: back(aten.addmm(s.b, vector(x), s.w)), 6, {"a": 8, "w": 6}),
    "aten.baddbmm": (lambda s, x: image(aten.baddbmm(s.b, tokens(x), s.w.expand(2, -1, -1))), 6, {"a": 8, "w": 6}),
    "aten.mv": (lambda s, x: aten.mv(vector(x), s.v)[:, None, None, None], 1, A),
    "aten.addmv": (lambda s, x: aten.addmv(x[:, 0, 0, 0] * 0, vector(x), s.v)[:, None, None, None], 1, {}),
    "aten.dot": (lambda s, x: x * aten.dot(x.flatten(2)[0, :, 0], s.v), 8, A),
    "aten.vdot": (lambda s, x: x * torch.vdot(x.flatten(2)[0, :, 0], s.v), 8, A),
    "aten.matmul": (whole(lambda s, x: image(aten.matmul(tokens(x), s.w))), 6, {"a": 8, "w": 6}),
    "function.__rmatmul__": (lambda s, x: image(torch.Tensor.__rmatmul__(s.w, tokens(x))), 6, {"a": 8, "w": 6}),
    "aten.conv1d": (whole(lambda s, x: aten.conv1d(x.flatten(2), s.k[..., 0])[..., None]), 6, {"a": 8, "k": 6}),
    "aten.conv2d": (whole(lambda s, x: aten.conv2d(x, s.k)), 6, {"a": 8, "k": 6}),
    "aten.conv3d": (whole(lambda s, x: aten.conv3d(x[:, :, None], s.k[:, :, None])[:, :, 0]), 6, {"a": 8, "k": 6}),
    # statistics
    "aten.std": (lambda s, x: x / (x.std((2, 3), keepdim=True) + 1), 8, A),
    "aten.std_mean": (lambda s, x: back(torch.std_mean(x, (2, 3))[0]), 8, A),
    "aten.var_mean": (lambda s, x: back(torch.var_mean(x, (2, 3))[0]), 8, A),
    "aten.norm": (lambda s, x: back(aten.norm(x, 2, [2, 3])), 8, A),
    "aten.prod": (lambda s, x: x.prod(2, keepdim=True), 8, A),
    "aten.nansum": (lambda s, x: back(x.nansum((2, 3))), 8, A),
    "aten.median": (lambda s, x: x.median(2, keepdim=True)[0], 8, A),
    "aten.mode": (lambda s, x: x.mode(2, keepdim=True)[0], 8, A),
    "aten.aminmax": (lambda s, x: x / torch.aminmax(x, dim=2, keepdim=True)[1].exp(), 8, A),
    "aten.argmin": (lambda s, x: x * x.argmin(2, keepdim=True), 8, A),
    "aten._is_all_true": (lambda s, x: checked(x), 8, A),
    "aten.cummin": (lambda s, x: x.cummin(2)[0], 8, A),
    "aten.cumprod": (lambda s, x: x.cumprod(2), 8, A),
    "aten.logcumsumexp": (lambda s, x: x.logcumsumexp(2), 8, A),
    "aten.softmax": (whole(lambda s, x: aten.softmax(x, 2)), 8, A),
    "aten.log_softmax": (whole(lambda s, x: aten.log_softmax(x, 2)), 8, A),
    "aten._safe_softmax": (lambda s, x: aten._safe_softmax(x, 2), 8, A),
    "aten.group_norm": (whole(lambda s, x: aten.group_norm(x, 2)), 8, {"a": 8}),
    "aten.native_layer_norm": (lambda s, x: aten.native_layer_norm(x, x.shape[2:], None, None, 1e-5)[0], 8, A),
    "aten._native_batch_norm_legit": (lambda s, x: aten._native_batch_norm_legit(
        x, s.n.weight, s.n.bias, s.n.running_mean, s.n.running_var, False, 0.1, 1e-5)[0], 8, A),
    "aten._native_batch_norm_legit_no_training": (lambda s, x: aten._native_batch_norm_legit_no_training(
        x, s.n.weight, s.n.bias, s.n.running_mean, s.n.running_var, 0.1, 1e-5)[0], 8, A),
    "aten._fft_c2c": (lambda s, x: torch.fft.fft2(torch.complex(x, x)).abs(), 8, A),
    "aten.all": (lambda s, x: x * (x > 0).all(3, keepdim=True), 8, A),
    "aten.any": (lambda s, x: x * (x > 0).any(3, keepdim=True), 8, A),
    "aten.native_group_norm": (lambda s, x: F.group_norm(x, 2), 8, A),
    "function.layer_norm": (lambda s, x: F.layer_norm(x, x.shape[2:]), 8, A),
    "function.rms_norm": (lambda s, x: F.rms_norm(x, x.shape[2:]), 8, A),
    # windows
    "aten.avg_pool2d": (lambda s, x: F.avg_pool2d(x, 2), 8, A),
    "aten._adaptive_avg_pool2d": (lambda s, x: F.adaptive_avg_pool2d(x, 4), 8, A),
    "aten.max_pool2d_with_indices": (lambda s, x: F.max_pool2d(x, 2), 8, A),
    "aten.upsample_nearest2d": (lambda s, x: F.interpolate(x, scale_factor=2), 8, A),
    "aten.max_pool1d": (whole(lambda s, x: aten.max_pool1d(x.flatten(2), 2)[..., None]), 8, A),
    "aten.max_pool2d": (whole(lambda s, x: aten.max_pool2d(x, 2)), 8, A),
    "aten.max_pool3d": (whole(lambda s, x: aten.max_pool3d(x[:, :, None], [1, 2, 2])[:, :, 0]), 8, A),
    "aten.max_pool3d_with_indices": (lambda s, x: F.max_pool3d(x[:, :, None], (1, 2, 2))[:, :, 0], 8, A),
    "aten.avg_pool1d": (whole(lambda s, x: aten.avg_pool1d(x.flatten(2), 2)[..., None]), 8, A),
    "aten.avg_pool3d": (lambda s, x: F.avg_pool3d(x[:, :, None], (1, 2, 2))[:, :, 0], 8, A),
    "aten._adaptive_avg_pool3d": (lambda s, x: F.adaptive_avg_pool3d(x[:, :, None], (1, 2, 2))[:, :, 0], 8, A),
    "aten.adaptive_avg_pool1d": (whole(lambda s, x: aten.adaptive_avg_pool1d(x.flatten(2), 4)[..., None]), 8, A),
    "aten.adaptive_avg_pool2d": (whole(lambda s, x: aten.adaptive_avg_pool2d(x, [4, 4])), 8, A),
    "aten.adaptive_max_pool2d": (lambda s, x: F.adaptive_max_pool2d(x, 4), 8, A),
    "aten.grid_sampler_3d": (lambda s, x: F.grid_sample(x[:, :, None], x.new_zeros(2, 1, 4, 4, 3), align_corners=False)[
        :, :, 0], 8, A),
    "aten.upsample_bicubic2d": (lambda s, x: F.interpolate(x, scale_factor=2, mode="bicubic"), 8, A),
    "aten.upsample_linear1d": (lambda s, x: F.interpolate(x.flatten(2), 32, mode="linear")[..., None], 8, A),
    "aten.upsample_nearest3d": (lambda s, x: F.interpolate(x[:, :, None], (1, 4, 4))[:, :, 0], 8, A),
    "aten.upsample_trilinear3d": (lambda s, x: F.interpolate(x[:, :, None], (1, 4, 4), mode="trilinear")[:, :, 0],
                                  8, A),
    "aten._upsample_bilinear2d_aa": (lambda s, x: F.interpolate(x, 4, mode="bilinear", antialias=True), 8, A),
    "aten._upsample_bicubic2d_aa": (lambda s, x: F.interpolate(x, 4, mode="bicubic", antialias=True), 8, A),
    "aten._upsample_nearest_exact2d": (lambda s, x: F.interpolate(x, 4, mode="nearest-exact"), 8, A),
}  # fmt: skip
REACHES = {  # what goes in stays
    "aten.diag_embed": lambda s, x: torch.diag_embed(vector(x)).sum(1)[:, :, None, None],
    "aten.linalg_cross": lambda s, x: torch.linalg.cross(x[:, :, :3], x[:, :, 1:4], dim=2),
    "aten.masked_scatter": lambda s, x: x.masked_scatter(x > 0, x.relu()),
    "aten.renorm": lambda s, x: x.renorm(2, 1, 1.0),
    "aten._embedding_bag_forward_only": lambda s, x: image(F.embedding_bag(
        torch.zeros(64, 2, dtype=torch.long), vector(x))[None].expand(2, -1, -1)),
    "unknown": lambda s, x: x * torch.cdist(vector(x), vector(x)).mean(),
    "function.lstm": lambda s, x: image(s.lstm(tokens(x))[0]),
    "function.gru": lambda s, x: image(s.gru(tokens(x))[0]),
    "function.rnn_tanh": lambda s, x: image(s.tanh(tokens(x))[0]),
    "function.rnn_relu": lambda s, x: image(s.relu(tokens(x))[0]),
}  # fmt: skip
# other devices, other versions of PyTorch, or random: seen by no call that a test on the CPU can compare
ELSEWHERE = {
    *("aten.cudnn_batch_norm", "aten.mkldnn_max_pool2d", "aten._batch_norm_with_update", "aten.bernoulli"),
    *("aten._embedding_bag", "aten.matmul"),
    *("function.__matmul__", "aten._convolution", "aten.real", "aten.imag"),
}


def build(middle, c_out):
    layers = {
        "w": nn.Parameter(torch.randn(8, 6)),
        "b": nn.Parameter(torch.randn(6)),
        "v": nn.Parameter(torch.randn(8)),
        "k": nn.Parameter(torch.randn(6, 8, 1, 1)),
        "n": nn.BatchNorm2d(8),
        "g": nn.Parameter(torch.rand(6, 1, 1, 1) + 0.5),
        "table": nn.Parameter(torch.randn(5, 8)),
        "lstm": nn.LSTM(8, 8, batch_first=True),
        "gru": nn.GRU(8, 8, batch_first=True),
        "tanh": nn.RNN(8, 8, batch_first=True),
        "relu": nn.RNN(8, 8, nonlinearity="relu", batch_first=True),
    }
    torch.manual_seed(0)
    return informative(Net(middle, 8, c_out, **layers)).double()


@pytest.mark.parametrize("op", EXACT)
def test_groups_by_hand_and_masked_equals_compacted(op):
    middle, c_out, groups = EXACT[op]
    model, x = build(middle, c_out), torch.randn(2, 3, 8, 8).double()
    graph = comb(model, x)
    assert {g.root: g.n_channels for g in graph.prunable_groups} == groups
    if not groups:
        return
    small = compact(model, graph, plan := random_plan(graph, keep=0.5, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad(), masked(model, graph, plan, execution="full_width") as m:
        assert relative_error(m(x), small(x)) < 1e-10


@pytest.mark.parametrize("op", REACHES)
def test_what_reaches_it_stays(op):
    graph = comb(build(REACHES[op], 8), torch.randn(2, 3, 8, 8).double(), on_unknown="freeze")
    frozen = [g.reason or "" for g in graph.groups if g.root == "a" and not g.prunable]
    assert frozen and ("reaches" in frozen[0] or "recurrent" in frozen[0])


def test_every_rule_has_a_net(monkeypatch):
    """The rule table is read, not a list: a new rule without a net fails here."""
    seen = set()
    for name, rule in list(RULES.items()):
        monkeypatch.setitem(RULES, name, lambda t, call, n=name, r=rule: (seen.add(n), r(t, call))[1])
    x = torch.randn(2, 3, 8, 8).double()
    nets = [build(m, c) for m, c, _ in EXACT.values()] + [build(m, 8) for m in REACHES.values()]
    nets += [*odd.EXACT.values(), *(n for n, _ in odd.FROZEN.values())]
    for net in nets:
        trace.comb(copy.deepcopy(net).double(), x, on_unknown="freeze")
    missing = " ".join(sorted(set(RULES) - seen - ELSEWHERE))
    assert not missing, f"rules without a net: {missing}"
