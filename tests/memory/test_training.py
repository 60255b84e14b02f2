"""A training step within a limit: what is predicted, what is chosen, and that the gradients stay those of the batch."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import cpd_fast as cpd
from cpd_fast.errors import MemoryLimitError
from cpd_fast.memory import blocks_of, checkpointed, fit_memory, parse_bytes
from cpd_fast.models import DeiTUPerNet, SeaFormer
from tests.ranks import run_ranks
from tests.score.test_memory import measured_peak


def timm_model(name):
    import timm  # not in the processes that a test starts

    return timm.create_model(name)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def segmentation(model, batch):
    """As mmseg has it: logits are enlarged to the labels; the auxiliary head counts 0.4."""
    out = model(batch[0])
    outs = out if isinstance(out, tuple) else (out,)
    enlarged = [F.interpolate(o, size=batch[1].shape[-2:], mode="bilinear") for o in outs]
    return sum(w * F.cross_entropy(o, batch[1]) for w, o in zip((1.0, 0.4), enlarged, strict=False))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


class Block(nn.Module):
    def __init__(self, width, norm, drop=0.0):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1), norm(width)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return x + self.drop(self.b(F.gelu(self.norm(self.a(x)))))


def network(norm=nn.BatchNorm2d, drop=0.0, width=16):
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Block(width, norm, drop) for _ in range(4)))
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)
    )


def group_norm(width):
    return nn.GroupNorm(4, width)


def data(n, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 24, 24, generator=g, dtype=dtype), torch.randint(5, (n,), generator=g)


def gradients(model):
    return {k: p.grad.clone() for k, p in model.named_parameters()}


# --------------------------------------------------------------------------------------------------------- prediction
NETWORKS = {
    "resnet50": (lambda: timm_model("resnet50"), (3, 224, 224), (), 256, cross_entropy, sgd),
    "resnext50": (lambda: timm_model("resnext50_32x4d"), (3, 224, 224), (), 256, cross_entropy, sgd),
    "deit_upernet": (DeiTUPerNet, (3, 512, 512), (512, 512), 8, segmentation, sgd),
    "seaformer": (SeaFormer, (3, 512, 512), (512, 512), 8, segmentation, sgd),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_prediction_against_pytorchs_tracker_on_the_papers_networks(name):
    """The whole step, optimizer included, on fake tensors: nothing of size is allocated."""
    build, image, label, samples, loss_fn, make = NETWORKS[name]
    limit = parse_bytes("10GiB")
    with torch.device("meta"):
        model = build()
        batch = torch.empty(samples, *image), torch.empty(samples, *label, dtype=torch.long)
    fit = fit_memory(model, batch, loss_fn, make(model), limit)
    assert fit.choice.predicted_peak <= limit and fit.choice.why.endswith("instead of 256") == (samples == 256)
    assert fit.choice.checkpoints == (name == "deit_upernet")  # batch norm behind a batch of 8: not to be divided
    other = copy.deepcopy(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        other.to_empty(device="cpu")
        optimizer = make(other)
        images = torch.empty(samples, *image)
        labels = torch.empty(samples, *label, dtype=torch.long)
        tracker = MemTracker()
        tracker.track_external(other, optimizer, images, labels)
        n = fit.choice.micro_batch or samples
        with checkpointed(other) if fit.choice.checkpoints else nullcontext(), tracker:
            for _ in range(1 if n == samples else 2):
                tracker.reset_mod_stats()
                loss_fn(other, (images[:n], labels[:n])).backward()
            optimizer.step()
        theirs = sum(s["Total"] for s in tracker.get_tracker_snapshot("peak").values())
    assert 0.93 * theirs < fit.choice.predicted_peak * 0.95 < 1.12 * theirs


@pytest.mark.parametrize("way", ["undivided", "micro-batches", "checkpoints"])
def test_prediction_against_the_allocator(way):
    model, batch = network(), data(64)
    optimizer = sgd(model)
    whole = fit_memory(model, batch, cross_entropy, optimizer, "10GiB").choice.predicted_peak
    limit = {"undivided": whole, "micro-batches": 0.6 * whole, "checkpoints": 0.25 * whole}[way]
    fit = fit_memory(model, batch, cross_entropy, optimizer, int(limit))
    assert (fit.choice.micro_batch is None, fit.choice.checkpoints) == (way == "undivided", way == "checkpoints")
    fit.backward(batch)
    optimizer.step()
    resident = sum(t.numel() * t.element_size() for t in [*model.state_dict().values(), *batch])
    resident += 2 * sum(p.numel() * p.element_size() for p in model.parameters())  # gradients and momentum
    measured = resident + measured_peak(lambda: fit.backward(batch))
    assert 0.8 * measured < 0.95 * fit.choice.predicted_peak < 1.1 * measured  # the rest: buffers inside library calls


def test_the_state_of_the_optimizer_counts():
    model, batch = network(width=64), data(2)
    size = sum(p.numel() * 4 for p in model.parameters())

    def peak(optimizer):
        return 0.95 * fit_memory(model, batch, cross_entropy, optimizer, "1GiB").choice.predicted_peak

    plain = peak(None)
    assert peak(sgd(model)) == pytest.approx(plain + size, rel=1e-3)
    assert peak(torch.optim.AdamW(model.parameters())) == pytest.approx(plain + 2 * size, rel=1e-3)


# ------------------------------------------------------------------------------------------------------ the gradients
def limit_for(model, batch, micro, **options):
    """The least limit at which ``micro`` samples fit."""
    small = tuple(t[:micro] for t in batch)
    peak = fit_memory(model, small, cross_entropy, **options, memory_limit="1000GiB").choice.predicted_peak
    own = 2 * sum(p.numel() * p.element_size() for p in model.parameters())
    return int(peak + sum(t.numel() * t.element_size() for t in batch) / 0.95 + own)


def test_micro_batches_add_up_to_the_gradients_of_the_batch():
    model, batch = network(group_norm).double(), data(30, dtype=torch.float64)
    loss = cross_entropy(model, batch)
    loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    fit = fit_memory(model, batch, cross_entropy, memory_limit=limit_for(model, batch, 7))
    assert fit.choice.micro_batch is not None and fit.choice.micro_batch < 30 and not fit.choice.checkpoints
    assert fit.backward(batch) == pytest.approx(float(loss), rel=1e-12)
    for k, g in gradients(model).items():
        torch.testing.assert_close(g, wanted[k], rtol=1e-11, atol=1e-13)


def test_shares_of_ignored_pixels():
    """A mean over the labelled pixels is none over samples; the shares that split gives make it exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1)).double()
    images, labels = torch.randn(12, 3, 16, 16, dtype=torch.float64), torch.randint(5, (12, 16, 16))
    labels[:5, :9] = 255

    def loss_fn(m, b):
        return F.cross_entropy(m(b[0]), b[1], ignore_index=255)

    def split(b, n):
        for x, y in zip(b[0].split(n), b[1].split(n), strict=True):
            yield (x, y), float((y != 255).sum()) / float((labels != 255).sum())

    def plain(b, n):
        return [(x, y) for x, y in zip(b[0].split(n), b[1].split(n), strict=True)]

    loss_fn(model, (images, labels)).backward()
    wanted, batch = gradients(model), (images, labels)
    limit = fit_memory(model, (images[:6], labels[:6]), loss_fn, memory_limit="1000GiB").choice.predicted_peak + 10**5
    off = {}
    for name, how in (("shares", split), ("none", plain)):
        model.zero_grad()
        fit = fit_memory(model, batch, loss_fn, memory_limit=limit, split=how)
        assert fit.choice.micro_batch is not None
        fit.backward(batch)
        off[name] = max(float((g - wanted[k]).abs().max()) for k, g in gradients(model).items())
    assert off["shares"] < 1e-12 < 1e-4 < off["none"]


def test_checkpoints_change_no_bit():
    """Dropout draws the same numbers again, and running statistics move once."""
    batch, results = data(16), {}
    for way in ("kept", "again"):
        model = network(drop=0.3).train()
        torch.manual_seed(5)
        if way == "again":
            with checkpointed(model):
                cross_entropy(model, batch).backward()
        else:
            cross_entropy(model, batch).backward()
        results[way] = {**gradients(model), **model.state_dict()}
        assert not any("forward" in m.__dict__ for m in model.modules())
    assert all(torch.equal(v, results["again"][k]) for k, v in results["kept"].items())
    assert int(model[1][0].norm.num_batches_tracked) == 1


def test_batch_norm_gets_checkpoints_rather_than_tiny_micro_batches():
    batch = data(64)
    for norm, checkpoints in ((nn.BatchNorm2d, True), (group_norm, False)):
        model = network(norm)
        fit = fit_memory(model, batch, cross_entropy, memory_limit=limit_for(model, batch, 8))
        assert fit.choice.checkpoints is checkpoints
    model = network().eval()  # frozen statistics: nothing depends on the batch
    assert not fit_memory(model, batch, cross_entropy, memory_limit=limit_for(model, batch, 8)).choice.checkpoints


def test_blocks():
    model = timm_model("resnet18")
    names = {id(m): n for n, m in model.named_modules()}
    assert [names[id(b)] for b in blocks_of(model)] == [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    vit = timm_model("deit_tiny_patch16_224")
    names = {id(m): n for n, m in vit.named_modules()}
    assert [names[id(b)] for b in blocks_of(vit)] == [f"blocks.{i}" for i in range(12)]


# -------------------------------------------------------------------------------------------------- teachers and loops
def distil(model, teacher, batch):
    with torch.no_grad():
        wanted = teacher(batch[0])
    assert wanted.dtype == torch.float32
    return cross_entropy(model, batch) + F.mse_loss(model(batch[0]), wanted)


def test_a_teacher_in_half_precision_when_that_saves_dividing():
    model, batch = network(width=8), data(16)
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 2000), nn.ReLU(), nn.Linear(2000, 5)).eval()
    before = copy.deepcopy(teacher.state_dict())
    full = fit_memory(model, batch, distil, memory_limit="1000GiB", teacher=teacher)
    assert full.teacher is teacher and not full.choice.half_teacher
    fit = fit_memory(model, batch, distil, memory_limit=int(full.choice.predicted_peak * 0.9), teacher=teacher)
    assert fit.choice.half_teacher and fit.choice.micro_batch is None and "half precision" in str(fit.choice)
    assert next(fit.teacher.parameters()).dtype == torch.float16
    assert fit.backward(batch) == pytest.approx(full.backward(batch), rel=2e-3)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_under_masks_with_a_scaler():
    """Pruning in a loop that is fitted: the gradients of removed channels are zero, the scale divides out."""
    model, batch = network(group_norm), data(24)
    graph = cpd.comb(model, batch[0][:1])
    cpd.attach_masks(model, graph, cpd.random_plan(graph, 0.5))
    cross_entropy(model, batch).backward()
    wanted = gradients(model)
    model.zero_grad()
    fit = fit_memory(model, batch, cross_entropy, memory_limit=limit_for(model, batch, 6))
    assert fit.choice.micro_batch is not None
    fit.backward(batch, torch.amp.GradScaler("cpu", init_scale=1024.0))
    for k, g in gradients(model).items():
        torch.testing.assert_close(g / 1024, wanted[k], rtol=1e-4, atol=1e-6)


def one_rank(rank):
    model, batch = network(group_norm), data(24)
    mine = tuple(t[rank::2] for t in batch)
    wrapped = nn.parallel.DistributedDataParallel(model)
    sent = []

    def count(_state, bucket):
        sent.append(bucket.index())
        work = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
        return work.then(lambda f: f.value()[0] / 2)

    wrapped.register_comm_hook(None, count)
    fit = fit_memory(wrapped, mine, cross_entropy, memory_limit=limit_for(model, mine, 4))
    assert fit.choice.micro_batch is not None and fit.choice.micro_batch < 12
    fit.backward(mine)
    return {"gradients": gradients(model), "sent": len(sent)}


def test_two_ranks_exchange_gradients_once():
    model, batch = network(group_norm), data(24)
    cross_entropy(model, batch).backward()
    for got in run_ranks(one_rank):
        assert got["sent"] == 1
        for k, g in gradients(model).items():
            torch.testing.assert_close(got["gradients"][k], g, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- bad input
def test_refusals():
    model, batch = network(), data(8)
    with pytest.raises(MemoryLimitError, match="expected bytes or a text such as '10GiB'"):
        fit_memory(model, batch, cross_entropy, memory_limit="much")
    with pytest.raises(MemoryLimitError, match="the model is on cpu, which has none of its own; give one: '10GiB'"):
        fit_memory(model, batch, cross_entropy)
    with pytest.raises(MemoryLimitError, match=r"2 samples need .* MiB, .* MiB with checkpoints; more than 0.0 MiB"):
        fit_memory(model, batch, cross_entropy, memory_limit=1000)
    with pytest.raises(MemoryLimitError, match="does not run on fake tensors .*keep .item"):
        fit_memory(model, batch, lambda m, b: cross_entropy(m, b) * m(b[0]).sum().item(), memory_limit="1GiB")
    with pytest.raises(MemoryLimitError, match="cannot divide the batch along dim 0"):
        fit_memory(model, (batch[0], torch.zeros(3)), lambda m, b: m(b[0]).sum(), memory_limit=10**6)
    assert all(p.grad is None for p in model.parameters())


def test_other_shapes_are_fitted_anew():
    model, batch = network(group_norm), data(8)
    fit = fit_memory(model, batch, cross_entropy, memory_limit=limit_for(model, batch, 8))
    assert fit.choice.micro_batch is None
    larger = F.interpolate(batch[0], scale_factor=2), batch[1]
    cross_entropy(model, larger).backward()
    wanted = gradients(model)
    model.zero_grad()
    fit.backward(larger)
    for k, g in gradients(model).items():
        torch.testing.assert_close(g, wanted[k], rtol=1e-4, atol=1e-6)
