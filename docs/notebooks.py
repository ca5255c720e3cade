"""Makes a page of each notebook as it was committed: its text and code, and what the code printed and drew."""

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
_LINK = re.compile(r"\]\(\.\./((?:\.\./)?notebooks/\w+)\.ipynb\)")


def on_files(files: Files, *, config: MkDocsConfig) -> None:
    """Add the notebooks, their pages, and the pictures on them."""
    for path in _NOTEBOOKS.glob("*.ipynb"):
        name, parts = f"notebooks/{path.name}", []
        files.append(File.generated(config, name, abs_src_path=str(path)))
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                parts.append(source.replace(".ipynb)", ".md)").replace("](../docs/", "](../"))
                continue
            parts.append(f"```python\n{source}\n```")
            for output in cell["outputs"]:
                if output["output_type"] == "stream":
                    parts.append(f"``` {{.text .no-copy .printed}}\n{''.join(output['text'])}```")
                else:
                    picture = f"{path.stem}_{len(parts)}.png"
                    drawn = base64.b64decode(output["data"]["image/png"])
                    files.append(File.generated(config, f"notebooks/{picture}", content=drawn))
                    parts.append(f"![What the code drew]({picture}){{.drawn}}")
        parts.append(f"[This page as a notebook]({path.name})")
        files.append(File.generated(config, name.replace(".ipynb", ".md"), content="\n\n".join(parts)))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Link to the pages where other pages link to the notebooks."""
    return _LINK.sub(r"](\1.md)", markdown)
