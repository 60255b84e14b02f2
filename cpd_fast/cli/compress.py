"""``cpd-fast compress`` and ``cpd-fast resume``: a whole run, from training to report."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cpd_fast.cli.recipe import FIRST, WHAT, allowed, check_recipe, read_recipe, settings_fields, to_yaml
from cpd_fast.cli.shared import as_json, show_results
from cpd_fast.config import TARGETS, ConfigError
from cpd_fast.errors import RunFolderError

WHAT_PANEL = "What is compressed"
FIRST_PANEL = "How (data and recipe may have other defaults: --dry-run shows them)"
MORE_PANEL = "How, in detail"


def command(
    recipe_file: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE.yaml]", help="Names and values of the flags below; flags win.")
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Into runs/demo or runs/demo-DATA; with no other option the climate task.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the whole recipe as YAML, and stop.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON at the end.")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write the scalars for TensorBoard into the run folder too.")
    ] = False,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="A setting as NAME=VALUE, the same as its flag.")
    ] = None,
    **flags: Any,
) -> None:
    """Train, prune, distil, compact, export and measure; the run folder keeps everything.

    Stop it whenever you like (Ctrl-C, kill): the same command goes on from the last checkpoint.

    cpd-fast compress --model timm/resnet18 --weights mine.safetensors --data photos/ --target-macs 0.5

    cpd-fast compress --model smp/Unet:resnet18 --data streets/ --layout cityscapes --size 256
    """
    asked = {} if recipe_file is None else read_recipe(recipe_file)
    asked |= dict(_setting(s) for s in setting or ()) | {k: v for k, v in flags.items() if v is not None}
    what, settings = check_recipe(asked, str(recipe_file or "flags"), sources=True)
    if demo and what["run_dir"] is None:
        named = "demo" if what["data"] == "climate" else f"demo-{what['data']}"
        what["run_dir"] = Path("runs") / named
    run(what, settings, dry_run=dry_run, json=json, tensorboard=tensorboard)


def resume(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that was stopped.")],
    json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON at the end.")] = False,
) -> None:
    """Go on with a run where it was stopped, with the settings it was made with.

    Raises:
        RunFolderError: If the folder is no run, or its settings are not those of this command.
    """
    run(*read_run(run_dir), json=json, tensorboard=(run_dir / "tensorboard").is_dir())


def read_run(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run folder was asked to do, as :func:`check_recipe` gives it.

    Raises:
        RunFolderError: If the folder is no run, or was made by the Python API with a task of its own.
    """
    from cpd_fast.recipes import TASKS
    from cpd_fast.recipes.run_folder import read_settings

    made = read_settings(run_dir)
    task = made.pop("task", None)
    if "data" not in made and task not in TASKS:
        raise RunFolderError(f"{run_dir}: was made from Python with a task of its own ({task}); resume it from there")
    asked = {"data": task, **made, "run_dir": str(run_dir)}
    if isinstance(asked.get("size"), str):
        asked["size"] = int(asked["size"])
    try:
        return check_recipe(asked, f"{run_dir}/run.json")
    except ConfigError as e:
        raise RunFolderError(f"{run_dir}: cannot be resumed here: {e}") from e


def run(
    what: Mapping[str, Any],
    settings: Mapping[str, Any],
    dry_run: bool = False,
    json: bool = False,
    tensorboard: bool = False,
) -> None:
    """Build the task, run the recipe, and print the result."""
    from cpd_fast import recipes
    from cpd_fast.cli.tasks import task_of
    from cpd_fast.recipes.tasks import default_config

    task, defaults = task_of(what)
    recipe, minutes = what["recipe"], what["minutes"]
    if recipe == "auto":  # it chooses the steps that are not given
        defaults = {k: v for k, v in defaults.items() if k not in ("prune_steps", "finetune_steps")}
    settings = {**defaults, **settings}
    config = default_config(task.name, **settings)
    name = task.name if recipe == "cpd" else f"{task.name}-{recipe}"
    limits = "-".join(f"{limit.removesuffix('_ms')}{value:g}" for limit, value in config.target().given.items())
    folder = what["run_dir"] or Path("runs") / f"{name}-{limits}-seed{config.seed}"
    if dry_run:
        print(to_yaml({**what, "run_dir": folder}, config.as_dict()), end="")
        return
    if tensorboard:
        from cpd_fast.packages import SCALARS, require

        require(SCALARS)
    known = {k: v for k, v in settings.items() if k not in TARGETS}
    result = getattr(recipes, recipe)(
        task,
        target=config.target(),
        run_dir=folder,
        command=shlex.join(["cpd-fast", *sys.argv[1:]]),
        **({} if minutes is None else {"minutes": minutes}),
        **known,
    )
    if tensorboard:
        from cpd_fast.report.tensorboard import write_scalars

        write_scalars(result.results, folder / "tensorboard")
        print(f"Scalars: {(folder / 'tensorboard').resolve()}", file=sys.stderr)
    if json:
        as_json(result.results.to_json())
        print(f"Report: {result.report.resolve()}", file=sys.stderr)
    else:
        show_results(result.results, result.report)


def _setting(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign:
        raise typer.BadParameter(f"--set {text}: expected NAME=VALUE")
    for kind in (int, float):
        try:
            return name.replace("-", "_"), kind(value)
        except ValueError:
            continue
    return name.replace("-", "_"), value


def _with_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Give the command one flag for every name of a recipe: typer reads them from the signature."""
    own = inspect.signature(function, eval_str=True).parameters
    flags = [
        _flag(name, kind, f"{text}{_in_brackets('', default)}", WHAT_PANEL)
        for name, (kind, default, text) in WHAT.items()
    ]
    for name, field in settings_fields().items():
        values = allowed(field) if {"low", "choices"} & field.metadata.keys() else ""
        text = field.metadata["help"] + _in_brackets(values if values != "names" else "", field.default)
        flags.append(_flag(name, type(field.default), text, FIRST_PANEL if name in FIRST else MORE_PANEL))
    parameters = [p for p in own.values() if p.kind is not inspect.Parameter.VAR_KEYWORD] + flags
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return function


def _in_brackets(values: str, default: Any) -> str:
    """What a flag may be and is."""
    parts = [*([values] if values else []), *([] if default in (None, "") else [f"default {default}"])]
    return f" ({'; '.join(parts)})" if parts else ""


def _flag(name: str, kind: type, text: str, panel: str) -> inspect.Parameter:
    option = typer.Option(f"--{name.replace('_', '-')}", help=text, show_default=False, rich_help_panel=panel)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


_with_flags(command)
