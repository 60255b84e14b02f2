"""What the site needs beside ``mkdocs.yml``: the figures that pages link to, and examples of docstrings as code."""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RESULTS = "bench/results"


class Docstrings(griffe.Extension):
    """Doctests are code to griffe under "Examples:" alone, and roles such as ``:func:`` are nothing to it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Put one docstring right."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r":(?:func|meth|class|mod|attr|data):`~?([^`]+)`", r"`\1`", text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take the results along: pages link to them where they are in the repository."""
    for path in (Path(config.config_file_path).parent / RESULTS).iterdir():
        files.append(File.generated(config, f"{RESULTS}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to them lead to where they are on the site."""
    return markdown.replace(f"(../{RESULTS}/", f"({RESULTS}/")
