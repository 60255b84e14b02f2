"""Networks by name: those of timm, segmentation_models_pytorch, transformers and one's own functions, built-in ones."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpd_fast.errors import CpdError

KINDS = "timm/NAME, smp/DECODER:ENCODER, hf/FOLDER, python.module:function, climate or fashion-mnist"


class ModelError(CpdError, ValueError):
    """A network cannot be built from its name, or weights do not fit it; the message says what was expected."""


@dataclass(frozen=True)
class Source:
    """How a network is built.

    Attributes:
        name: As it was asked for.
        build: Makes the network for so many classes (None: as many as it has by itself).
        mean: What its pictures are normalised with, 0-255; None: it does not say.
        std: Likewise.
        in_channels: Channels of its pictures.
        size: Side of its pictures where it says so.
    """

    name: str
    build: Callable[[int | None], nn.Module]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    in_channels: int = 3
    size: int | None = None


def model_source(name: str) -> Source:
    """Look a network up by its name.

    Raises:
        ModelError: If there is none; says what names look like, and near misses.
    """
    from cpd_fast.models import EfficientNetLite0FPN, SmallResNet

    if name == "climate":
        return Source(name, lambda n: EfficientNetLite0FPN(n or 5, pretrained=False), size=96)
    if name == "fashion-mnist":
        return Source(name, lambda n: SmallResNet(n or 10), in_channels=1, size=28)
    kind, _, rest = name.partition("/")
    if kind in ("timm", "smp") and rest:
        return (_timm if kind == "timm" else _smp)(name, rest)
    if kind == "hf" and rest:
        return _transformers(name, Path(rest))
    if ":" in name and "/" not in name:
        function = from_python(name)
        return Source(name, lambda n: _called(function, name, n))
    raise ModelError(f"model {name!r}: expected {KINDS}")


def build_model(name: str, size: int | None = None) -> tuple[nn.Module, tuple[int, ...]]:
    """A model by name with as many classes as it has by itself, and the shape of one example input."""
    source = model_source(name)
    side = size or source.size or 224
    return source.build(None), (1, source.in_channels, side, side)


def from_python(name: str) -> Callable[..., Any]:
    """``package.module:function``, looked for in the working directory too.

    Raises:
        ModelError: If module or function are not there.
    """
    module, _, attribute = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as e:
        raise ModelError(f"{name}: module {module} cannot be imported ({e}); start in its folder or install it") from e
    except AttributeError as e:
        raise ModelError(f"{name}: {e}; write it as python.module:function") from e
    if not callable(found):
        raise ModelError(f"{name}: {attribute} is a {type(found).__name__}, expected a function")
    return found


def _called(function: Callable[..., Any], name: str, classes: int | None) -> nn.Module:
    takes = "num_classes" in inspect.signature(function).parameters
    model = function(num_classes=classes) if takes and classes is not None else function()
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name}: returned a {type(model).__name__}, expected a torch.nn.Module")
    return model


def _package(name: str, pip: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        if not isinstance(e, ModuleNotFoundError) or e.name != name.partition(".")[0]:
            raise ModelError(f"{name} cannot be imported ({e}); install a torchvision that fits torch") from e
        raise ModelError(f"{name} is not installed; install it with: pip install {pip}") from e
    except RuntimeError as e:  # a torchvision built for another torch
        raise ModelError(f"{name} cannot be imported ({e}); install a torchvision that fits torch") from e


def _timm(name: str, rest: str) -> Source:
    timm = _package("timm", "timm")
    if not timm.is_model(rest):
        near = difflib.get_close_matches(rest, timm.list_models(), n=3)
        raise ModelError(f"timm has no model {rest!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    config = timm.get_pretrained_cfg(rest)
    mean, std = (tuple(255 * v for v in getattr(config, k)) if config else None for k in ("mean", "std"))
    size = config.input_size[-1] if config and getattr(config, "fixed_input_size", False) else None

    def build(classes: int | None) -> nn.Module:
        return timm.create_model(rest, pretrained=False, **({} if classes is None else {"num_classes": classes}))

    return Source(name, build, mean, std, size=size)


def _smp(name: str, rest: str) -> Source:
    smp = _package("segmentation_models_pytorch", "segmentation-models-pytorch")
    decoder, _, encoder = rest.partition(":")
    make = getattr(smp, decoder, None)
    if not isinstance(make, type) or not issubclass(make, nn.Module):
        known = sorted(n for n, c in vars(smp).items() if isinstance(c, type) and issubclass(c, nn.Module))
        raise ModelError(f"model {name!r}: no decoder {decoder!r}; choose one of {', '.join(known)}")

    def build(classes: int | None) -> nn.Module:
        try:
            return make(encoder_name=encoder or "resnet18", encoder_weights=None, classes=classes or 2)
        except (KeyError, ValueError) as e:
            raise ModelError(f"model {name!r}: {str(e)[:300]}") from e

    return Source(name, build)


class Logits(nn.Module):
    """A network of transformers as one from pictures to logits.

    Args:
        model: Returns an object with ``logits``.

    Returns logits ``(N, K)``, or ``(N, K, H, W)`` at the size of the picture where the model returns smaller maps.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pictures ``(N, 3, H, W)`` -> logits."""
        logits = self.model(pixel_values=pixel_values).logits
        if logits.dim() == 4 and logits.shape[-2:] != pixel_values.shape[-2:]:
            logits = F.interpolate(logits, size=pixel_values.shape[-2:], mode="bilinear", align_corners=False)
        return logits


def _transformers(name: str, folder: Path) -> Source:
    if not (folder / "config.json").is_file():
        raise ModelError(f"model {name!r}: {folder} holds no config.json; save_pretrained() makes such a folder")
    transformers = _package("transformers", "transformers")
    transformers.utils.logging.disable_progress_bar()  # of a load that takes a moment
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise ModelError(f"{folder}: {str(e).splitlines()[0]}") from e
    kinds = config.architectures or []
    auto = (
        transformers.AutoModelForSemanticSegmentation
        if any("Segmentation" in k for k in kinds)
        else transformers.AutoModelForImageClassification
    )

    def build(classes: int | None) -> nn.Module:
        options = {} if classes is None or classes == config.num_labels else {"num_labels": classes}
        try:
            model = auto.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True,
                ignore_mismatched_sizes=bool(options), **options,
            )  # fmt: skip
        except (OSError, ValueError) as e:
            raise ModelError(f"{folder}: {str(e).splitlines()[0]}") from e
        return Logits(model)

    mean = std = None
    if (folder / "preprocessor_config.json").is_file():
        how = json.loads((folder / "preprocessor_config.json").read_text())
        if how.get("do_normalize", True) and "image_mean" in how and "image_std" in how:
            mean, std = (tuple(255.0 * v for v in how[k]) for k in ("image_mean", "image_std"))
    size = config.image_size if isinstance(getattr(config, "image_size", None), int) else None
    return Source(name, build, mean, std, size=size)


def load_weights(model: nn.Module, path: Path, classes: int) -> list[str]:
    """Load a state dict from a safetensors file, or from a PyTorch file that holds tensors only.

    Args:
        model: Gets the weights.
        path: The file. ``state_dict``, ``model`` and ``module.`` around the names are looked through.
        classes: Classes of the model: a last layer that was trained for another number of them stays fresh.

    Returns:
        Names of tensors that stayed fresh for that reason.

    Raises:
        ModelError: If the file cannot be read or does not fit; lists what does not.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file of weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever a parser says of a strange file
        raise ModelError(
            f"{path}: no safetensors file and no PyTorch file of tensors alone ({type(e).__name__}: {e})"
        ) from e
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelError(f"{path}: expected tensors by name, got {type(state).__name__}")
    state = {k.removeprefix("module."): v for k, v in state.items()}
    wanted = model.state_dict()
    fresh, faults = [], [f"{k}: not a tensor of the model" for k in state if k not in wanted]
    for name, want in wanted.items():
        got = state.get(name)
        if got is None:
            faults.append(f"{name}: missing")
        elif got.shape != want.shape:
            if len(want) == classes and want.shape[1:] == got.shape[1:]:  # the classifier, for other classes
                fresh.append(name)
                state[name] = want
            else:
                faults.append(f"{name}: expected {tuple(want.shape)}, got {tuple(got.shape)}")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ModelError(f"{path}: does not fit the model: {'; '.join(faults[:5])}{more}")
    model.load_state_dict(state)
    return fresh
