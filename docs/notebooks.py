"""Makes a page of each committed notebook: its text, its code, and the printed and drawn output.

mkdocs loads this file as a hook. Other pages link to the notebook files. The site replaces these links by links to the
pages.
"""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
# In a search, a page that explains comes before an example.
_FRONT = "---\nsearch: {boost: 0.4}\n---"
_LINK = re.compile(r"\]\(\.\./((?:\.\./)?notebooks/\w+)\.ipynb\)")


def _output(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return f"``` {{.text .no-copy .printed}}\n{''.join(output['text']).rstrip()}\n```"
    return f"![Output of the code](data:image/png;base64,{output['data']['image/png'].strip()}){{.drawn}}"


def _cell(cell: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source.replace("](../docs/", "](../").replace(".ipynb)", ".md)")
    return "\n\n".join([f"``` {{.python .cell}}\n{source}\n```", *map(_output, cell["outputs"])])


def on_files(files: Files, *, config: MkDocsConfig) -> None:
    """Add the notebooks, and a page of each."""
    for path in _NOTEBOOKS.glob("*.ipynb"):
        cells = map(_cell, json.loads(path.read_text(encoding="utf-8"))["cells"])
        page = "\n\n".join([_FRONT, *cells, f"[This page as a notebook]({path.name})"])
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace links to notebooks by links to their pages."""
    return _LINK.sub(r"](\1.md)", markdown)
