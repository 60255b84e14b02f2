"""The networks that must comb, prune and compact exactly: timm, torchvision, segmentation_models_pytorch, transformers.

``networks.json`` lists them; weights are random, and so are all statistics, because a norm scale of 1 or a layer scale
of 1e-6 would hide a wrong coupling.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ENTRIES: list[dict[str, Any]] = json.loads(Path(__file__).with_name("networks.json").read_text())


def build(entry: dict[str, Any]) -> tuple[nn.Module, Callable[[Any], Any]]:
    """The model in eval mode, and a function that picks the tensors out of its output."""
    torch.manual_seed(0)
    name, kw = entry["name"], entry.get("kw", {})
    output: Callable[[Any], Any] = lambda out: out  # noqa: E731
    if entry["src"] == "timm":
        import timm

        model = timm.create_model(name, pretrained=False, **kw)
    elif entry["src"] in ("tv", "tvseg"):
        import torchvision

        backbone = {"weights_backbone": None} if entry["src"] == "tvseg" else {}
        model = torchvision.models.get_model(name, weights=None, **backbone, **kw)
    elif entry["src"] == "smp":
        import segmentation_models_pytorch as smp

        decoder, encoder = name.split(":")
        model = getattr(smp, decoder)(encoder_name=encoder, encoder_weights=None, classes=7, **kw)
    elif entry["src"] == "mmseg":
        from tests.zoo import mmseg

        model = mmseg.build(name, entry["size"])
    else:
        model = _transformers(name)
        output = lambda out: out.logits  # noqa: E731
    return _informative(model).eval(), output


def example_input(entry: dict[str, Any], batch: int = 2) -> torch.Tensor:
    """Pictures of the entry's size, (batch, 3, size, size)."""
    size = entry["size"]
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))


class Tokens(nn.Module):
    """A language model on tokens read off the first row of a picture."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        """x (N, 3, H, W) -> logits (N, W, vocabulary)."""
        return self.model(input_ids=(x[:, 0, 0].abs() * 20).long() % 50)


def _transformers(name: str) -> nn.Module:
    import transformers as T

    small = {"image_size": 96, "num_labels": 10, "attn_implementation": "eager"}
    vit = {**small, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768}
    window = {**small, "embed_dim": 48, "depths": [2, 2, 2], "num_heads": [2, 4, 8], "window_size": 6}
    stages = {"hidden_sizes": [32, 64, 128, 256], "depths": [2, 2, 2, 2]}
    eager = {"attn_implementation": "eager"}
    decoder = {
        **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 50, "head_dim": 16},
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False, "use_cache": False},
    }
    match name:
        case "Llama" | "Qwen3" | "Gemma":
            config = getattr(T, f"{name}Config")(**decoder)
            return Tokens(getattr(T, f"{name}ForCausalLM")(config))
        case "ViT":
            return T.ViTForImageClassification(T.ViTConfig(**vit))
        case "DeiT":
            return T.DeiTForImageClassification(T.DeiTConfig(**vit))
        case "BEiT":
            return T.BeitForImageClassification(T.BeitConfig(**vit))
        case "Dinov2":
            config = {**vit, "image_size": 98, "patch_size": 14}
            config.pop("intermediate_size")
            return T.Dinov2ForImageClassification(T.Dinov2Config(**config))
        case "Swin":
            return T.SwinForImageClassification(T.SwinConfig(**window))
        case "Swinv2":
            return T.Swinv2ForImageClassification(T.Swinv2Config(**window))
        case "SegFormer":
            return T.SegformerForSemanticSegmentation(T.SegformerConfig(num_labels=7, **eager))
        case "ConvNeXt":
            return T.ConvNextForImageClassification(T.ConvNextConfig(**stages, num_labels=10))
        case "ConvNeXtV2":
            return T.ConvNextV2ForImageClassification(T.ConvNextV2Config(**stages, num_labels=10))
        case "ResNet":
            sizes = [64, 128, 256, 512]
            return T.ResNetForImageClassification(T.ResNetConfig(embedding_size=32, hidden_sizes=sizes, num_labels=10))
        case "PVT":
            return T.PvtForImageClassification(T.PvtConfig(image_size=96, num_labels=10))
        case "PoolFormer":
            return T.PoolFormerForImageClassification(T.PoolFormerConfig(num_labels=10))
        case "MobileViT":
            return T.MobileViTForImageClassification(T.MobileViTConfig(image_size=128, num_labels=10))
        case "UperNet-ConvNeXt":
            backbone = T.ConvNextConfig(**stages, out_features=["stage1", "stage2", "stage3", "stage4"])
            config = T.UperNetConfig(backbone_config=backbone, hidden_size=64, auxiliary_in_channels=128, num_labels=7)
            return T.UperNetForSemanticSegmentation(config)
    raise KeyError(name)


def _informative(model: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() <= 1 or p.numel() == max(p.shape):
                is_bias = name.rsplit(".", 1)[-1].endswith("bias")
                p.copy_(torch.randn(p.shape, generator=g) * 0.1 if is_bias else 0.5 + torch.rand(p.shape, generator=g))
            elif not p.any():
                p.copy_(torch.randn(p.shape, generator=g) * 0.02)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(torch.randn(b.shape, generator=g) * 0.1)
            elif name.endswith("running_var"):
                b.copy_(0.5 + torch.rand(b.shape, generator=g))
    return model
