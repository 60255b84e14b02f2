"""What README and docs show is run: Python blocks of a page one after the other, commands held against what exists."""

import functools
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import cpd_fast as cpd
from cpd_fast import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    needs = {name: name for name in ("timm", "mmengine", "lightning")} | {"transformers": "accelerate"}  # its Trainer
    for name, package in needs.items():
        if re.search(rf"^(import|from) {name}\b", page.read_text(), re.MULTILINE):
            pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for n, block in enumerate(blocks(page, "python"), 1):
        exec(compile(block, f"{page.name}, Python block {n}", "exec"), names)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "sh")], ids=lambda p: p.name)
def test_commands_exist(page):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = typer.main.get_command(cli.app).commands
    for line in "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert words[1] in targets, line
        elif words[:1] == ["cpd-fast"]:
            assert words[1] in commands, line
            flags = {o for p in commands[words[1]].params for o in p.opts}
            assert {w for w in words if w.startswith("--")} <= flags, line


def test_the_site_builds_and_shows_examples_as_code(tmp_path):
    """What ``make docs`` does: a link that leads nowhere is an error."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "bench/results/cpd.png").is_file()
    page = (tmp_path / "api/index.html").read_text()
    assert "doc-module" not in page  # where a function and a module have one name, mkdocstrings takes the module
    assert '<span class="gp">&gt;&gt;&gt; </span>' in page and "<blockquote>\n<blockquote>" not in page
    assert not re.search(r":(func|meth|class):", page)


def test_every_block_says_what_it_is():
    for page in PAGES:
        kinds = {kind for kind, _ in BLOCK.findall(page.read_text())}
        assert kinds <= {"python", "sh", "text", "yaml"}, f"{page.name}: {kinds}"


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_reference_holds_every_public_name():
    """``cpd_fast.__all__``, and what its three modules make public; each has a docstring."""
    shown = set(re.findall(r"^::: cpd_fast\.([\w.]+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE))
    modules = {"losses", "ops", "recipes"}
    public = {f"{m}.{n}" for m in modules for n in getattr(cpd, m).__all__ if n != "TASKS"}
    public |= set(cpd.__all__) - modules - {"__version__"}
    parts = [name.split(".") for name in shown]
    assert public <= {f"{p[0]}.{p[-1]}" if p[0] in modules else p[-1] for p in parts}
    for name in shown:
        assert found(f"cpd_fast.{name}").__doc__, name


def found(path):
    """What the reference shows: a module where there is one, as for mkdocstrings; ``cpd_fast.comb`` is one."""
    for end in range(path.count(".") + 1, 0, -1):
        parts = path.split(".")
        try:
            thing = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        return functools.reduce(getattr, parts[end:], thing)
