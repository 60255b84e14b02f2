"""CIRKD and the adapters against loops written from the paper, on all parts; the memory's queues; messages."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpd_fast.distill.cirkd as cirkd
from cpd_fast.errors import ShapeError
from cpd_fast.losses import CIRKD, ChannelWiseKL, FeatureCWD, LogitKL, PixelMemory, WithTeacher, minibatch_relation
from tests.ranks import run_ranks

SMALL = {"pixel_slots": 7, "region_slots": 5, "contrast_pixels": 9, "contrast_regions": 6, "pixels_per_class": 3}


def kl_rows(student, teacher):
    """Mean over rows of KL(softmax(teacher) || softmax(student)), row by row."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = t.exp() / t.exp().sum(), s.exp() / s.exp().sum()
        total = total + (p * (p / q).log()).sum()
    return total / len(student)


def unit(features):  # (N, C, H, W) -> list of (HW, C)
    return [(f / f.norm(dim=0, keepdim=True)).flatten(1).T for f in features]


def batch(n=2, classes=3, dtype=torch.float64):
    feat_S = torch.randn(n, 4, 3, 5, dtype=dtype, requires_grad=True)
    labels = torch.randint(classes, (n, 6, 10))
    labels[0, :2] = 255
    logits = [torch.randn(n, classes, 3, 5, dtype=dtype) for _ in range(2)]
    return feat_S, torch.randn(n, 6, 3, 5, dtype=dtype), labels, *logits


@pytest.mark.parametrize("cells", [2**22, 20])
def test_minibatch_relation_equals_the_loops(cells, monkeypatch):
    monkeypatch.setattr(cirkd, "_CELLS", cells)  # 20: blocks of one row
    feat_S, feat_T, *_ = batch(3)
    s, t = unit(feat_S), unit(feat_T)
    expected = sum(kl_rows(s[i] @ s[j].T / 0.1, t[i] @ t[j].T / 0.1) for i in range(3) for j in range(3)) / 9
    value = minibatch_relation(feat_S, feat_T, 0.1)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    theirs, ours = (torch.autograd.grad(v, feat_S)[0] for v in (expected, value))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_large_maps_are_pooled_first(monkeypatch):
    monkeypatch.setattr(cirkd, "_POOL_FROM", 6)
    student, teacher = torch.randn(2, 3, 6, 9), torch.randn(2, 3, 6, 9)
    pooled = [F.avg_pool2d(x, 4, ceil_mode=True) for x in (student, teacher)]
    torch.testing.assert_close(minibatch_relation(student, teacher), minibatch_relation(*pooled))


def test_contrast_equals_the_loops():
    feat_S, feat_T, labels, logits_S, logits_T = batch()
    criterion = CIRKD(3, 4, 6, **SMALL).double().eval()
    parts = criterion.parts(feat_S, feat_T, labels, logits_S, logits_T)
    pixels, regions = criterion.memory.sample(9, 6)
    assert pixels.shape == (3 * 4, 6) and regions.shape == (3 * 3, 6)
    small = labels[:, ::2, ::2].flatten()  # nearest at half the size
    rows_S, rows_T = (torch.cat(unit(f))[small != 255] for f in (criterion.project(feat_S), feat_T))
    for name, bank in (("pixel", pixels), ("region", regions)):
        torch.testing.assert_close(
            parts[name], kl_rows(rows_S @ bank.T / 0.1, rows_T @ bank.T / 0.1), rtol=1e-8, atol=0
        )
    log_s, log_t = (x.log_softmax(1) for x in (logits_S, logits_T))
    kl = (log_t.exp() * (log_t - log_s)).sum(1).flatten()
    torch.testing.assert_close(parts["logit"], kl[small != 255].mean(), rtol=1e-9, atol=0)
    total = parts["logit"] + parts["batch"] + 0.1 * parts["pixel"] + 0.1 * parts["region"]
    torch.testing.assert_close(criterion(feat_S, feat_T, labels, logits_S, logits_T), total)


def test_gradients():
    feat_S, feat_T, labels, logits_S, logits_T = batch()
    criterion = CIRKD(3, 4, 6, **SMALL).double().eval()
    logits_S.requires_grad_()
    weight = criterion.project[0].weight
    assert torch.autograd.gradcheck(
        lambda f, z, w: criterion(f, feat_T, labels, z, logits_T),
        (feat_S, logits_S, weight),
        eps=1e-6,
        atol=1e-6,
        nondet_tol=1e-13,
    )
    adapter = FeatureCWD(4, 6, tau=2.0).double()
    assert torch.autograd.gradcheck(lambda f: adapter(f, feat_T), (feat_S,))


def test_pixels_enter_the_queue_of_their_own_class():
    """What the released code gets wrong: it enters the image's first pixels, of any class."""
    memory = PixelMemory(2, 2, pixel_slots=8, region_slots=4, pixels_per_class=3)
    labels = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 255]])
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    units = torch.stack([*[east] * 4, *[north] * 3, -east])[None]
    memory.enter(units, labels)
    assert torch.equal(memory.pixels[0, :3], east.expand(3, 2)) and torch.equal(
        memory.pixels[1, :3], north.expand(3, 2)
    )
    assert torch.equal(memory.regions[:, 0], torch.stack([east, north]))
    assert memory.pixel_next.tolist() == [3, 3] and memory.region_next.tolist() == [1, 1]
    assert not (memory.pixels == -east).all(-1).any()  # ignored pixels enter nothing


def test_queues_ring_around_the_oldest():
    memory = PixelMemory(1, 2, pixel_slots=4, region_slots=2, pixels_per_class=3)
    for angle in (0.0, 0.5, 1.0):
        a = torch.tensor(angle)
        memory.enter(torch.stack([a.cos(), a.sin()]).expand(1, 3, 2), torch.zeros(1, 3, dtype=torch.long))
    angles = torch.atan2(memory.pixels[0, :, 1], memory.pixels[0, :, 0])
    torch.testing.assert_close(angles, torch.tensor([1.0, 0.5, 1.0, 1.0]))  # slots 2, 3, 0 are the newest
    torch.testing.assert_close(torch.atan2(memory.regions[0, :, 1], memory.regions[0, :, 0]), torch.tensor([1.0, 0.5]))
    assert memory.pixel_next.tolist() == [1]


def test_queues_resume_from_a_checkpoint_bit_for_bit():
    def steps(criterion, first, last):
        values = []
        for i in range(first, last):
            torch.manual_seed(i)
            values.append(criterion(*batch(dtype=torch.float32)).item())
        return values

    torch.manual_seed(5)
    whole = CIRKD(3, 4, 6, **SMALL)
    start = {k: v.clone() for k, v in whole.state_dict().items()}
    expected = steps(whole, 0, 4)
    half = CIRKD(3, 4, 6, **SMALL)
    half.load_state_dict(start)
    steps(half, 0, 2)
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    resumed = CIRKD(3, 4, 6, **SMALL)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    torch.manual_seed(99)  # the draws follow from the number of steps, not from the global state
    assert steps(resumed, 2, 4) == expected[2:]
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())


def test_all_ignored_is_zero_with_a_graph():
    feat_S, feat_T, labels, *_ = batch()
    criterion = CIRKD(3, 4, 6, batch_weight=0.0, **SMALL).double()
    value = criterion(feat_S, feat_T, torch.full_like(labels, 255))
    value.backward()
    assert value.item() == 0 and not feat_S.grad.any()


def test_half_precision_features_under_autocast():
    feat_S, feat_T, labels, logits_S, logits_T = (
        x.float() if x.is_floating_point() else x for x in (v.detach() for v in batch())
    )
    criterion = CIRKD(3, 4, 6, **SMALL).eval()
    exact = criterion(feat_S, feat_T, labels, logits_S, logits_T)
    with torch.autocast("cpu", torch.bfloat16):
        rough = criterion(feat_S.bfloat16(), feat_T.bfloat16(), labels, logits_S.bfloat16(), logits_T.bfloat16())
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0)


def _enter(rank):
    torch.manual_seed(0)
    memory = PixelMemory(3, 6, 7, 5, 3)
    units, labels = F.normalize(torch.randn(4, 15, 6), dim=2), torch.randint(3, (4, 15))
    mine = slice(2 * rank, 2 * rank + 2) if rank is not None else slice(None)
    memory.enter(units[mine], labels[mine])
    return memory.state_dict()


def test_queues_of_two_ranks_are_those_of_one():
    first, second = run_ranks(_enter)
    alone = _enter(None)
    for name, value in alone.items():
        assert torch.equal(first[name], value) and torch.equal(second[name], value)


def test_feature_cwd_is_cwd_behind_its_adapter_and_follows_a_compaction():
    student, teacher = torch.randn(2, 4, 3, 5), torch.randn(2, 6, 3, 5)
    criterion = FeatureCWD(4, 6, tau=2.0, loss_weight=50.0)
    conv = criterion.adapter[0]
    adapted = torch.einsum("oi,nihw->nohw", conv.weight[:, :, 0, 0], student) + conv.bias[None, :, None, None]
    expected = ChannelWiseKL(2.0, 50.0)(adapted, teacher)
    torch.testing.assert_close(criterion(student, teacher), expected)
    student[:, 1:3] = 0
    before = criterion(student, teacher)
    criterion.keep_channels([0, 3])
    torch.testing.assert_close(criterion(student[:, [0, 3]], teacher), before)
    head = CIRKD(3, 4, 6, **SMALL)
    head.keep_channels([0, 3])
    assert head.project[0].weight.shape == (6, 2, 1, 1)
    assert [type(m) for m in FeatureCWD(4, 6, norm=True).adapter] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]


def test_with_teacher_adds_up():
    s, t, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    criterion = WithTeacher(nn.CrossEntropyLoss(), ChannelWiseKL(4.0, 3.0), LogitKL(2.0))
    expected = F.cross_entropy(s, y) + ChannelWiseKL(4.0, 3.0)(s, t) + LogitKL(2.0)(s, t)
    torch.testing.assert_close(criterion(s, t, y), expected)


def test_messages():
    feat_S, feat_T, labels, *_ = batch()
    criterion = CIRKD(3, 4, 6, **SMALL).double()
    with pytest.raises(ShapeError, match=r"features of 4 and 6 channels, got 3 and 6; after compaction call keep_chan"):
        criterion(feat_S[:, :3], feat_T, labels)
    with pytest.raises(ShapeError, match=r"equal N, H and W, got \(2, 4, 3, 4\) and \(2, 6, 3, 5\)"):
        criterion(feat_S[..., :4], feat_T, labels)
    with pytest.raises(ShapeError, match=r"expected labels \(N, H, W\) with N=2, got shape \(2, 60\)"):
        criterion(feat_S, feat_T, labels.flatten(1))
    with pytest.raises(ShapeError, match=r"FeatureCWD: made for .* 4 and 6 channels, got shapes \(2, 3, 3, 5\)"):
        FeatureCWD(4, 6)(feat_S[:, :3], feat_T)
    with pytest.raises(ShapeError, match=r"expected channels within 0..3, got \[9\]"):
        FeatureCWD(4, 6).keep_channels([9])
    with pytest.raises(ValueError, match="CIRKD: tau must be a positive finite number, got 0"):
        CIRKD(3, 4, 6, tau=0)
