"""One tiny net an operator: either exact with channels gone, or frozen with the reason; never wrong."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cpd_fast.compact import compact
from cpd_fast.pipeline import comb
from cpd_fast.prune import masked
from cpd_fast.schedule import random_plan
from tests.nets import informative, relative_error


class Net(nn.Module):
    """Layers a (C channels out of an image) and o, with ``middle`` between them."""

    def __init__(self, middle, c, c_out, **layers):
        super().__init__()
        self.middle = middle
        self.a, self.o = nn.Conv2d(3, c, 1), nn.Conv2d(c_out, 2, 1)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.o(self.middle(self, self.a(x)))


def shape_of(x):
    return x.shape[1]


def tokens(x):
    return x.flatten(2).transpose(1, 2)


def copied(z, x):
    z[:, :, ::2].copy_(x[:, :, ::2])
    return z


def zeroed(x, channels):
    x[:, channels] = 0
    return x


def image(x):
    return x.transpose(1, 2).reshape(2, -1, 8, 8)


def put(x, index, value):
    x[index] = value
    return x


def routed(x, gate, expert):
    """Tokens that choose the expert are added to what it makes of them."""
    token = torch.where(gate(x).flatten(0, 1).argmax(-1) == 0)[0]
    flat = x.flatten(0, 1)
    return flat.clone().index_add_(0, token, expert(flat[token])).view_as(x)


def group_deviation(x, groups):
    n, c, h, w = x.shape
    split = x.reshape(n, groups, c // groups, h, w)
    return split.var((2, 3, 4), keepdim=True).add(1e-5).sqrt().expand(split.shape).reshape(n, c, h, w)


EXACT = {
    "instance_norm": Net(lambda s, x: s.n(x), 8, 8, n=nn.InstanceNorm2d(8, affine=True)),
    "instance_norm_tracking": Net(lambda s, x: s.n(x), 8, 8, n=nn.InstanceNorm2d(8, track_running_stats=True)),
    "batch_norm_without_affine": Net(lambda s, x: s.n(x).sigmoid(), 8, 8, n=nn.BatchNorm2d(8, affine=False)),
    "prelu": Net(lambda s, x: s.n(x), 8, 8, n=nn.PReLU(8)),
    "prelu_shared": Net(lambda s, x: s.n(x), 8, 8, n=nn.PReLU()),
    "depthwise_transposed": Net(lambda s, x: s.n(x), 8, 8, n=nn.ConvTranspose2d(8, 8, 2, 2, groups=8)),
    "conv3d": Net(lambda s, x: s.n(x[:, :, None])[:, :, 0], 8, 8, n=nn.Conv3d(8, 8, 1)),
    "chunk": Net(lambda s, x: (lambda t: t[0] * t[1] + t[2])(x.chunk(3, 1)), 12, 4),
    "unequal_split": Net(lambda s, x: s.p(x.split([5, 7], 1)[0]) + s.q(x.split([5, 7], 1)[1]), 12, 4,
                         p=nn.Conv2d(5, 4, 1), q=nn.Conv2d(7, 4, 1)),
    "glu": Net(lambda s, x: F.glu(x, 1), 12, 6),
    "channel_shuffle": Net(lambda s, x: F.channel_shuffle(x, 2), 8, 8),
    "pixel_unshuffle": Net(lambda s, x: F.pixel_unshuffle(x, 2), 4, 16),
    "interpolate": Net(lambda s, x: F.interpolate(x, scale_factor=2, mode="bilinear"), 8, 8),
    "grid_sample": Net(lambda s, x: F.grid_sample(x, x.new_zeros(2, 4, 4, 2), align_corners=False), 8, 8),
    "im2col": Net(lambda s, x: F.unfold(x, 2)[..., None], 4, 16),
    "fold": Net(lambda s, x: F.fold(F.unfold(s.n(x), 2, stride=2), (8, 8), 2, stride=2), 6, 6, n=nn.Conv2d(6, 6, 1)),
    "fold_of_new_windows": Net(lambda s, x: F.fold(s.n(x).flatten(2)[..., :16], (8, 8), 2, stride=2), 6, 3,
                               n=nn.Conv2d(6, 12, 1)),
    "tensor_unfold": Net(lambda s, x: x.unfold(2, 2, 2).amax(-1), 8, 8),
    "stack_mean": Net(lambda s, x: torch.stack([x, x.relu()]).mean(0), 8, 8),
    "repeat_interleave": Net(lambda s, x: x.repeat_interleave(2, 1), 4, 8),
    "repeat": Net(lambda s, x: x.repeat(1, 2, 1, 1), 4, 8),
    "dot_product": Net(lambda s, x: (x * s.n(x)).sum(1, keepdim=True), 8, 1, n=nn.Conv2d(8, 8, 1)),
    "share_of_the_sum": Net(lambda s, x: x / x.abs().sum(1, keepdim=True), 8, 8),
    "scale_by_width": Net(lambda s, x: x / shape_of(x) ** 0.5, 8, 8),
    "mean_of_everything": Net(lambda s, x: x - x.mean(), 8, 8),
    "non_local": Net(lambda s, x: (lambda v: (v.flatten(2) @ (s.q(x).flatten(2).transpose(1, 2) @ s.k(x).flatten(
        2)).softmax(-1).transpose(1, 2)).view_as(v))(s.v(x)), 8, 8,
        q=nn.Conv2d(8, 4, 1), k=nn.Conv2d(8, 4, 1), v=nn.Conv2d(8, 8, 1)),
    # nothing that a mask holds at 0 stands between these and the sum over channels
    "linear_attention": Net(lambda s, x: (lambda q, k, v: image(q @ (k.transpose(1, 2) @ v)))(
        F.elu(tokens(s.q(x))) + 1, F.elu(tokens(s.k(x))) + 1, tokens(s.v(x))), 8, 8,
        q=nn.Conv2d(8, 6, 1), k=nn.Conv2d(8, 6, 1), v=nn.Conv2d(8, 8, 1)),
    "attention_of_sigmoids": Net(lambda s, x: F.scaled_dot_product_attention(
        s.q(tokens(x)).sigmoid(), s.k(tokens(x)).sigmoid(), tokens(x), scale=0.3).transpose(1, 2).reshape(2, -1, 8, 8),
        8, 8, q=nn.Linear(8, 4), k=nn.Linear(8, 4)),
    "products_of_cosines": Net(lambda s, x: (tokens(x.cos()) @ s.n(x).cos().flatten(2)).mean(2).view(2, 1, 8, 8),
                               8, 1, n=nn.Conv2d(8, 8, 1)),
    "computed_linear": Net(lambda s, x: image(F.linear(tokens(x).cos(), s.n(x).mean((2, 3))[:1].cos())).reshape(
        2, 1, 8, 8), 8, 1, n=nn.Conv2d(8, 8, 1)),
    "batch_norm_of_tokens": Net(lambda s, x: image(s.n(tokens(x))), 8, 8,
                                n=nn.BatchNorm1d(64)),
    "written_after_it_was_cleared": Net(lambda s, x: (lambda z: (z.add_(1), tokens(z) @ s.n(x).sigmoid().flatten(2)))(
        x.clone())[1].mean(2).view(2, 1, 8, 8), 8, 1, n=nn.Conv2d(8, 8, 1)),
    "circular_padding": Net(lambda s, x: s.n(x), 8, 6, n=nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular")),
    "reflected_padding": Net(lambda s, x: s.n(x), 8, 6, n=nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect")),
    "fourier_filter": Net(lambda s, x: torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(s.f), s=(8, 8)),
                          8, 8, f=nn.Parameter(torch.randn(8, 8, 5, 2))),
    "complex_modulus": Net(lambda s, x: torch.complex(x, s.n(x)).abs(), 8, 8, n=nn.Conv2d(8, 8, 1)),
    "triangle_of_space": Net(lambda s, x: x.tril(), 8, 8),
    "zeros_like_written": Net(lambda s, x: copied(torch.zeros_like(x), x), 8, 8),
    "halves_swapped": Net(lambda s, x: torch.cat([x[:, x.shape[1] // 2 :], -x[:, : x.shape[1] // 2]], 1) + x, 8, 8),
    "even_and_odd": Net(lambda s, x: torch.stack([-x[:, 1::2], x[:, ::2]], 2).flatten(1, 2) + x, 8, 8),
    "tensor_split": Net(lambda s, x: (lambda t: t[0] * t[1])(x.tensor_split(2, 1)), 8, 4),
    # numbers that the forward puts into tensors
    "times_its_width_in_a_tensor": Net(lambda s, x: x * x.new_tensor([shape_of(x)]), 8, 8),
    "times_its_width_on_a_device": Net(lambda s, x: x / torch.tensor(shape_of(x) / 1.0, device=x.device), 8, 8),
    "times_as_many_ones": Net(lambda s, x: x * torch.ones(shape_of(x), 1, 1).to(x) * 3, 8, 8),
    "times_the_number_of_ones": Net(lambda s, x: x * torch.ones_like(x).sum(1, keepdim=True), 8, 8),
    # statistics of channels, which a mask takes of the kept ones
    "softmax": Net(lambda s, x: F.softmax(x, 1) * s.n(x).softmax(1, torch.float64), 8, 8, n=nn.Conv2d(8, 8, 1)),
    "log_softmax": Net(lambda s, x: F.log_softmax(x, dim=1), 8, 8),
    "logsumexp": Net(lambda s, x: x - x.logsumexp(1, keepdim=True), 8, 8),
    "normalize": Net(lambda s, x: F.normalize(x, dim=1) + F.normalize(x, 1.0), 8, 8),
    "cosine": Net(lambda s, x: x * F.cosine_similarity(x, s.n(x).cos(), dim=1)[:, None], 8, 8, n=nn.Conv2d(8, 8, 1)),
    "norms_of_channels": Net(lambda s, x: x / x.norm() + x / torch.linalg.vector_norm(x, dim=1, keepdim=True), 8, 8),
    "softmin": Net(lambda s, x: F.softmin(x, 1), 8, 8),
    "extremes": Net(lambda s, x: x * x.amax(1, keepdim=True) - x.amin((1,), True), 8, 8),
    "largest_and_smallest": Net(lambda s, x: x * x.max(1, keepdim=True)[0] - torch.min(x, dim=1, keepdim=True).values,
                                8, 8),
    "softmax_of_a_grid": Net(lambda s, x: x.unflatten(1, (2, -1)).softmax(2).flatten(1, 2), 8, 8),
    "convolved_beside_channels": Net(lambda s, x: image(s.k(tokens(x))[:, :, : x.shape[1]]), 8, 8,
                                     k=nn.Conv1d(64, 64, 1)),
    "channel_attention": Net(lambda s, x: ((x.flatten(2) @ x.flatten(2).transpose(1, 2)).softmax(-1) @ x.flatten(
        2)).view_as(x), 8, 8),
    "selected_paths": Net(lambda s, x: (lambda w: (torch.stack([x, s.p(x)], 1) * w).sum(1))(
        s.n(x).mean((2, 3), keepdim=True).unflatten(1, (2, -1)).softmax(1)), 8, 8,
        n=nn.Conv2d(8, 16, 1), p=nn.Conv2d(8, 8, 1)),
    "halves_added": Net(lambda s, x: x.unflatten(1, (2, -1)).sum(1) * x.unflatten(1, (2, -1)).amax(1), 8, 4),
    # lookups and writes along space
    "gathered": Net(lambda s, x: x.flatten(2).gather(2, torch.arange(63, -1, -1).expand(2, shape_of(x), -1)).view_as(x),
                    8, 8),
    "index_added": Net(lambda s, x: image(torch.zeros_like(tokens(x)).index_add(1, torch.arange(64) // 2, tokens(x))),
                       8, 8),
    "index_copied": Net(lambda s, x: image(tokens(x).index_copy(1, torch.tensor([0, 5]), tokens(s.n(x))[:, :2])), 8, 8,
                        n=nn.Conv2d(8, 8, 1)),
    "index_filled": Net(lambda s, x: x.index_fill(2, torch.tensor([0, 5]), 2.0), 8, 8),
    "scattered": Net(lambda s, x: image(tokens(x).scatter_reduce(
        1, torch.arange(32)[None, :, None].expand(2, -1, shape_of(x)), tokens(s.n(x))[:, 32:], "amax")), 8, 8,
        n=nn.Conv2d(8, 8, 1)),
    "positions_set": Net(lambda s, x: put(x.clone(), (slice(None), slice(None), torch.tensor([0, 5])), 2.0), 8, 8),
    "routed_to_an_expert": Net(lambda s, x: image(routed(tokens(x), s.gate, s.n)), 8, 8, n=nn.Linear(8, 8),
                               gate=nn.Linear(8, 2)),
    "turned": Net(lambda s, x: x.rot90(1, (2, 3)), 8, 8),
    "diagonal_of_space": Net(lambda s, x: x * x.diagonal(dim1=2, dim2=3).mean(-1)[..., None, None], 8, 8),
    "median_of_space": Net(lambda s, x: x - x.flatten(2).kthvalue(9, 2)[0][..., None, None], 8, 8),
    "running_maximum": Net(lambda s, x: x.cummax(2)[0], 8, 8),
    "linear_with_a_vector": Net(lambda s, x: F.linear(tokens(x), s.v).view(2, 1, 8, 8), 8, 1,
                                v=nn.Parameter(torch.randn(8))),
    # a statistic of each group of channels, expanded over the group
    "group_deviation": Net(lambda s, x: s.n(x) / group_deviation(s.n(x), 2), 8, 12, n=nn.Conv2d(8, 12, 1)),
    "other_channels_by_group_deviation": Net(lambda s, x: s.p(x) * group_deviation(s.n(x), 3), 8, 12,
                                             n=nn.Conv2d(8, 12, 1), p=nn.Conv2d(8, 12, 1)),
    "divided_by_a_parameter": Net(lambda s, x: x / s.b, 8, 8, b=nn.Parameter(torch.rand(8, 1, 1) + 0.5)),
}  # fmt: skip
FROZEN = {
    "divided_by_channels": (Net(lambda s, x: x / s.n(x).mean((2, 3), keepdim=True), 8, 8, n=nn.Conv2d(8, 8, 1)),
                            "div has a pole"),
    "written_at_indices": (Net(lambda s, x: zeroed(x.clone(), [0, 3]), 8, 8),
                           "written at indices along this axis"),
    "channels_at_indices": (Net(lambda s, x: put(x.clone(), (slice(None), slice(None), torch.tensor([0, 5])),
                                                 s.n(x)[:, :, :2]), 8, 8, n=nn.Conv2d(8, 8, 1)), "reaches index_put"),
    "channels_scattered": (Net(lambda s, x: torch.zeros_like(x).scatter_add(1, torch.zeros_like(x, dtype=torch.long),
                                                                            x), 8, 8), "written at indices"),
    "gathered_channels": (Net(lambda s, x: x.gather(1, torch.zeros(2, 1, 8, 8, dtype=torch.long)), 8, 1),
                          "indexed by a tensor"),
    "root_of_its_width_in_a_tensor": (Net(lambda s, x: x / torch.tensor(float(shape_of(x))).sqrt(), 8, 8),
                                      "could not be repaired"),
    "width_compared": (Net(lambda s, x: x * (shape_of(x) > 4), 8, 8), "could not be repaired"),
    "turned_channels": (Net(lambda s, x: x.rot90(1, (1, 2)), 8, 8), "turned along this axis"),
    "diagonal_of_channels": (Net(lambda s, x: x.diagonal(dim1=1, dim2=2)[:, None], 8, 1), "diagonal over this axis"),
    "zeroed_slice": (Net(lambda s, x: zeroed(x.clone(), slice(0, 3)), 8, 8),
                     "sliced at fixed positions"),
    "place_of_the_largest": (Net(lambda s, x: x * x.max(1, keepdim=True)[1], 8, 8),
                             "positions along this axis are read"),
    "sorted": (Net(lambda s, x: x.sort(1)[0], 8, 8), "sort over this axis"),
    "largest": (Net(lambda s, x: x.topk(3, 1)[0], 8, 3), "topk over this axis"),
    "rolled": (Net(lambda s, x: x.roll(1, 1), 8, 8), "rolled or flipped"),
    "looked_up": (Net(lambda s, x: x[:, [0, 3, 5]], 8, 3), "indexed by a tensor"),
    "conv_over_channels": (Net(lambda s, x: x * s.k(x.mean((2, 3))[:, None])[:, 0, :, None, None].sigmoid(), 8, 8,
                               k=nn.Conv1d(1, 1, 3, padding=1)), "carries no channels"),
    "bilinear": (Net(lambda s, x: image(s.n(tokens(x), tokens(x))), 8, 5, n=nn.Bilinear(8, 8, 5)), "reaches trilinear"),
    "resized_over_channels": (Net(lambda s, x: image(F.interpolate(tokens(x), 12)), 8, 12),
                              "interpolation runs over this axis"),
    "einsum_of_cosines": (Net(lambda s, x: torch.einsum("nchw,nchw->nhw", x.cos(), s.n(x).cos())[:, None], 8, 1,
                              n=nn.Conv2d(8, 8, 1)), "neither factor of which is 0"),
    "cumsum": (Net(lambda s, x: x.cumsum(1), 8, 8), "cumsum over this axis"),
    "flip": (Net(lambda s, x: x.flip(1), 8, 8), "rolled or flipped"),
    "slice": (Net(lambda s, x: x[:, 2:7], 8, 5), "sliced at fixed positions"),
    "fixed_table": (Net(lambda s, x: x + torch.linspace(0, 1, 8).view(1, 8, 1, 1), 8, 8), "could not be repaired"),
    "written_in_place": (Net(lambda s, x: (lambda z: (z[:, :8].copy_(x), z)[1])(x.new_zeros(2, 10, 8, 8)), 8, 10),
                         "written in place"),
    "transposed_groups": (Net(lambda s, x: s.n(x), 8, 12, n=nn.ConvTranspose2d(8, 12, 2, 2, groups=2)),
                          "grouped transposed convolution"),
}  # fmt: skip


@pytest.mark.parametrize("keep", [0.8, 0.5, 0.2])
@pytest.mark.parametrize("net", EXACT)
def test_exact(net, keep):
    model, x = informative(EXACT[net]).double(), torch.randn(2, 3, 8, 8).double()
    graph = comb(model, x)
    assert "a" in {g.root for g in graph.prunable_groups}
    plan = random_plan(graph, keep=keep, generator=torch.Generator().manual_seed(0))
    small = compact(model, graph, plan)
    with torch.no_grad(), masked(model, graph, plan) as m:
        assert relative_error(m(x), small(x)) < 1e-10
    seen, got = x.clone().requires_grad_(), x.clone().requires_grad_()
    with masked(model, graph, plan) as m:
        m(seen).square().sum().backward()
    small(got).square().sum().backward()
    assert relative_error(seen.grad, got.grad) < 1e-10
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.zero_grad()


@pytest.mark.parametrize("net", FROZEN)
def test_frozen_with_the_reason(net):
    model, reason = FROZEN[net]
    graph = comb(informative(model), torch.randn(2, 3, 8, 8))
    frozen = [g.reason or "" for g in graph.groups if g.root == "a" and not g.prunable]
    assert any(reason in r for r in frozen), frozen
