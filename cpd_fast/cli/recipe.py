"""What a run is asked for: a YAML recipe, flags, or both; all faults at once. Recipe and flags have the same names."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpd_fast.config import RECIPES as PAPERS
from cpd_fast.config import TARGETS, CompressConfig, ConfigError

RECIPES = (*PAPERS, "auto")
WHAT: dict[str, tuple[Any, Any, str]] = {
    "recipe": (str, "cpd", f"how: {', '.join(RECIPES)}"),
    "minutes": (float, None, "time that recipe auto chooses by"),
    "model": (str, None, "timm/NAME, smp/DECODER:ENCODER, hf/FOLDER or python.module:function; built-in data have one"),
    "weights": (Path, None, "weights of the model, .safetensors or a PyTorch file of tensors; then teacher_steps is 0"),
    "data": (str, "climate", "climate, fashion-mnist, a folder of pictures, or python.module:function"),
    "data_dir": (Path, None, "folder of fashion-mnist's files, where Debian's package is not installed"),
    "layout": (str, "auto", "of a folder: auto, image-folder, segmentation, ade20k or cityscapes"),
    "size": (int, None, "side of the square pictures; default: the model's, or 224"),
    "run_dir": (Path, None, "run folder; default runs/DATA-TARGET-seedSEED"),
}
FIRST = (*TARGETS, "seed", "teacher_steps", "prune_steps", "finetune_steps", "batch_size")  # in --help


def settings_fields() -> dict[str, dataclasses.Field[Any]]:
    """The settings of the recipe by name, those that people change most first."""
    fields = {f.name: f for f in dataclasses.fields(CompressConfig)}
    return {n: fields[n] for n in (*FIRST, *(n for n in fields if n not in FIRST))}


def allowed(field: dataclasses.Field[Any]) -> str:
    """Which values a setting may have.

    Example:
        >>> allowed(settings_fields()["seed"]), allowed(settings_fields()["granularity"])
        ('0 to 2,147,483,647', 'dim, head')
    """
    about = field.metadata
    if "low" in about:
        return f"{about['low']:,.10g} to {about['high']:,.10g}"
    return "bytes" if "memory" in about else ", ".join(about["choices"]) or "names"


def read_recipe(path: Path) -> dict[str, Any]:
    """The names and values of a YAML recipe; dashes in names mean underscores.

    Raises:
        ConfigError: If it cannot be read or is no mapping.
    """
    import yaml

    try:
        doc = yaml.safe_load(path.read_text())
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror})") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: not a YAML file ({' '.join(str(e).split())})") from e
    if not isinstance(doc, dict):
        raise ConfigError(f"{path}: expected names and values such as 'model: timm/resnet18', got {type(doc).__name__}")
    return {str(k).replace("-", "_"): v for k, v in doc.items()}


def check_recipe(
    asked: Mapping[str, Any], where: str = "recipe", sources: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split what was asked into what is compressed and the settings of how; ``sources``: look for model and data too.

    Returns:
        ``what`` with every name of ``WHAT``, defaults filled in, and the settings that were given.

    Raises:
        ConfigError: If names are unknown or values wrong; lists every fault, one a line.
    """
    faults = []
    known = [*WHAT, *settings_fields()]
    for name in asked:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            faults.append(f"{name}: no such setting" + (f", did you mean {near[0]}?" if near else ""))
    what: dict[str, Any] = {}
    for name, (kind, default, _) in WHAT.items():
        value: Any = asked.get(name)
        if value is None:
            what[name] = default
            continue
        also: dict[Any, tuple[Any, ...]] = {Path: (str, Path), float: (int, float)}
        fits = also.get(kind, (kind,))
        if not isinstance(value, fits) or isinstance(value, bool) or (kind in (int, float) and not value > 0):
            word = {str: "text", Path: "a path", int: "a whole number from 1", float: "a positive number"}[kind]
            faults.append(f"{name}={value!r}: expected {word}")
            continue
        what[name] = Path(value) if kind is Path else value
    if what.get("recipe") not in (*RECIPES, None):
        faults.append(f"recipe={what['recipe']!r}: expected one of {', '.join(RECIPES)}")
    if (what.get("recipe") == "auto") != (what.get("minutes") is not None):
        faults.append("minutes: recipe auto needs them, and the others take none")
    if what.get("weights") is not None and not what["weights"].is_file():
        faults.append(f"weights={str(what['weights'])!r}: no such file")
    faults += source_faults(what) if sources else []
    settings = {k: v for k, v in asked.items() if k in settings_fields() and v is not None}
    try:
        CompressConfig.from_dict(settings)
    except ConfigError as e:
        faults += str(e).split("; ")
    if faults:
        raise ConfigError(f"{where}: {len(faults)} fault{'s' if len(faults) > 1 else ''}\n  " + "\n  ".join(faults))
    return what, settings


def source_faults(what: Mapping[str, Any]) -> list[str]:
    """Faults of model, data and layout that show before one is built and the other read."""
    from cpd_fast.cli.models import KINDS, ModelError, model_source
    from cpd_fast.data.folders import LAYOUTS
    from cpd_fast.recipes import TASKS

    faults = []
    data, model = what.get("data"), what.get("model")
    if data is not None and data not in TASKS and not (":" in data or Path(data).is_dir()):
        faults.append(
            f"data {data!r} is unknown; choose one of {', '.join(TASKS)}, or give a folder of pictures or "
            "python.module:function"
        )
    elif data is not None and data not in TASKS and model is None:
        faults.append(f"data {data!r} has no network of its own: give model, e.g. --model timm/resnet18")
    if (
        model is not None
        and model not in TASKS
        and not (model.startswith(("timm/", "smp/", "hf/")) or (":" in model and "/" not in model))
    ):
        faults.append(f"model {model!r}: expected {KINDS}")
    elif model is not None:
        try:
            model_source(model)
        except ModelError as e:
            faults.append(str(e))
    if what.get("layout") not in (*LAYOUTS, None):
        faults.append(f"layout {what['layout']!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    return faults


def to_yaml(what: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """A recipe that asks for the same."""
    import yaml

    doc = {k: str(v) if isinstance(v, Path) else v for k, v in {**what, **settings}.items() if v is not None}
    return yaml.safe_dump(doc, sort_keys=False)
