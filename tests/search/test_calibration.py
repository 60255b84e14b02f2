"""Statistics after pruning: adaptive batch norm, matched means, and the three ways of running a candidate."""

import copy

import pytest
import torch
from torch import nn

import cpd_fast as cpd
from cpd_fast.errors import SearchError
from cpd_fast.search import PAPER_MOMENTUM, Batch, CandidateBuilder, adapt_batch_norm, materialise
from cpd_fast.search.calibration import channel_means, match_means
from tests.nets import NETS, informative
from tests.search.nets import setting, small


def batches(n=3, size=8):
    g = torch.Generator().manual_seed(0)
    return [Batch((torch.randn(size, 2, 6, 6, generator=g) * (k + 1),), {}) for k in range(n)]


def test_true_average_over_the_batches():
    net, data = small(), batches()
    first = net[0]
    adapt_batch_norm(net, data)
    with torch.no_grad():
        outs = [first(b.args[0]) for b in data]
    torch.testing.assert_close(net[1].running_mean, torch.stack([y.mean((0, 2, 3)) for y in outs]).mean(0))
    torch.testing.assert_close(net[1].running_var, torch.stack([y.var((0, 2, 3)) for y in outs]).mean(0))
    assert int(net[1].num_batches_tracked) == 3


def test_momentum_of_the_paper_is_what_train_mode_does():
    net, data = small(), batches()
    plain = copy.deepcopy(net).train()
    with torch.no_grad():
        for b in data:
            plain(b.args[0])
    adapt_batch_norm(net, data, momentum=PAPER_MOMENTUM)
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(buffer, plain.get_buffer(name))


def test_only_statistics_move_and_modes_come_back():
    net = nn.Sequential(small(), nn.Dropout(0.5))
    net.train()
    net[0][1].eval()
    before = copy.deepcopy(net)
    drawn = torch.get_rng_state()
    adapt_batch_norm(net, batches())
    assert torch.equal(drawn, torch.get_rng_state())  # dropout stayed off
    assert [m.training for m in net.modules()] == [m.training for m in before.modules()]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True))
    assert all(p.grad is None for p in net.parameters())
    assert net[0][1].momentum == 0.1 and not torch.equal(net[0][1].running_mean, before[0][1].running_mean)


def test_a_failing_batch_leaves_modes_and_momenta():
    net = small()
    with pytest.raises(RuntimeError):
        adapt_batch_norm(net, [Batch((torch.zeros(2, 5, 6, 6),), {})])
    assert net[1].momentum == 0.1 and not any(m.training for m in net.modules())


def test_inputs_without_labels():
    _, graph, x = setting()
    for given in ([x[0]], [(x[0], torch.zeros(16))], [{"input": x[0]}]):
        (batch,) = materialise(given, graph, torch.device("cpu"))
        assert torch.equal([*batch.args, *batch.kwargs.values()][0], x[0])
        assert len(batch.args) + len(batch.kwargs) == 1


def test_wrong_calibration():
    _, graph, _ = setting()
    with pytest.raises(SearchError, match="calibration: expected at least one batch of training inputs, got none"):
        materialise(iter([]), graph, torch.device("cpu"))
    with pytest.raises(SearchError, match="calibration: batch 0 is a str; expected a tensor, a tuple"):
        materialise(["x"], graph, torch.device("cpu"))


def test_matched_means_are_those_of_the_dense_network():
    net = informative(nn.Sequential(nn.Conv2d(2, 9, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 8), nn.Linear(8, 3)))
    data = batches(1, 32)
    graph = cpd.comb(net, data[0].args[0][:1])
    plan = cpd.random_plan(graph, 0.5)
    means = channel_means(net, graph, data)
    pruned = cpd.compact(net, graph, plan)
    off = channel_means(pruned, cpd.comb(pruned, data[0].args[0][:1]), data)["4"]
    assert (off - means["4"]).abs().max() > 0.05
    match_means(pruned, graph, plan, data, means)
    after = channel_means(pruned, cpd.comb(pruned, data[0].args[0][:1]), data)
    for name in ("0", "3", "4"):
        kept = torch.tensor(plan.get({"0": "0", "3": "3"}.get(name, ""), range(len(means[name]))))
        torch.testing.assert_close(after[name], means[name][kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["residual", "depthwise", "grouped", "norms", "fused_attention", "tokens"])
def test_all_executions_agree(name):
    found = [n for n in NETS if n.replace("-", "_").startswith(name)]
    build, shape, _ = NETS[found[0]]
    torch.manual_seed(0)
    net = informative(build())
    x = torch.randn(4, *shape[1:])
    graph = cpd.comb(net, x[:1])
    plan, data = cpd.random_plan(graph, 0.6), (Batch((x,), {}), Batch((x * 2 + 1,), {}))
    state = {k: v.clone() for k, v in net.state_dict().items()}
    outs = {}
    for execution in ("auto", "compact", "masked"):
        builder = CandidateBuilder(net, graph, data, cpd.random_plan(graph, 0.5), execution)
        for _ in range(2):  # nothing of the first candidate is left in the second
            with torch.no_grad(), builder.candidate(plan) as candidate:
                outs[execution] = candidate(x)
    for execution, out in outs.items():
        assert (out - outs["compact"]).abs().max() <= 2e-5 * outs["compact"].abs().max(), execution
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_slicing_is_refused_where_a_forward_holds_sizes():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.width = nn.Linear(4, 6), nn.Linear(6, 2), 6

        def forward(self, x):
            return self.b(self.a(x).reshape(-1, self.width))

    net, x = Holds().eval(), torch.randn(3, 4)
    graph = cpd.comb(net, x[:1])
    data, probe = (Batch((x,), {}),), cpd.random_plan(graph, 0.5)
    assert CandidateBuilder(net, graph, data, probe).execution == "compact"
    with pytest.raises(SearchError, match="execution='sliced': this forward holds sizes that must be repaired"):
        CandidateBuilder(net, graph, data, probe, "sliced")
    with pytest.raises(SearchError, match="execution='fast': expected one of auto, sliced, compact, masked"):
        CandidateBuilder(net, graph, data, probe, "fast")


def test_a_plain_network_is_sliced():
    net, graph, x = setting()
    assert CandidateBuilder(net, graph, (Batch((x[0],), {}),), cpd.random_plan(graph, 0.5)).execution == "sliced"
