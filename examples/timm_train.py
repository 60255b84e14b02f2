"""A training script in timm's style (its models, optimizers and schedulers) with one flag more: --prune-macs.

python examples/timm_train.py --data /path/to/imagenet/train --model resnet50 --pretrained --prune-macs 0.5
"""

import argparse
from pathlib import Path

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.nn import functional as F

import cpd_fast as cpd


def batches(args: argparse.Namespace, num_classes: int):
    """Pictures and labels: from a folder of classes, or random ones to try the script."""
    if args.synthetic:
        generator = torch.Generator().manual_seed(args.seed)
        while True:
            shape = (args.batch, 3, args.size, args.size)
            yield torch.randn(shape, generator=generator), torch.randint(num_classes, shape[:1], generator=generator)
    from timm.data import create_dataset, create_loader

    data = create_dataset("", args.data, is_training=True)
    loader = create_loader(
        data, (3, args.size, args.size), args.batch, is_training=True, device=torch.device(args.device)
    )
    while True:
        yield from loader


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data")
    parser.add_argument("--synthetic", action="store_true", help="random pictures in place of --data")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prune-macs", type=float, help="share of the MACs that remains; leave out to just train")
    parser.add_argument("--out", type=Path, default=Path("small.safetensors"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = timm.create_model(args.model, pretrained=args.pretrained).to(args.device)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.05)
    scheduler = CosineLRScheduler(optimizer, t_initial=args.steps)
    example = torch.zeros(1, 3, args.size, args.size, device=args.device)
    pruner = None
    if args.prune_macs:
        teacher = timm.create_model(args.model).to(args.device).eval()
        teacher.load_state_dict(model.state_dict())
        imitate = cpd.losses.LogitKL(temperature=4.0)
        events = min(20, args.steps // 2)
        schedule = cpd.Greedy(interval=args.steps // 2 // events, steps=events)  # half of the steps to prune
        pruner = cpd.Pruner(model, example, cpd.Target(macs=args.prune_macs), schedule=schedule, per_cost="macs")

    model.train()
    for step, (images, labels) in zip(range(args.steps), batches(args, model.num_classes), strict=False):
        images, labels = images.to(args.device), labels.to(args.device)
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        if pruner is not None:
            with torch.no_grad():
                wanted = teacher(images)
            loss = loss + imitate(logits, wanted)
        loss.backward()
        if pruner is not None:
            pruner.step()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(step + 1)
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    if pruner is not None:
        small = pruner.compact()
        print("MACs and parameters:", cpd.cost(model.eval(), example), cpd.cost(small.eval(), example), sep="\n")
        cpd.save(args.out, small, pruner.graph, pruner.plan)


if __name__ == "__main__":
    main()
