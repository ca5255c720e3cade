"""Links public names in documents and docstrings to their entries in the reference.

mkdocs loads this file twice: as a hook for the pages, and as an extension of griffe for the docstrings. Both link
`fo.name`. A name without an entry is a warning, and `mkdocs build --strict` fails on warnings.
"""

import re
import textwrap
from pathlib import Path
from typing import Any

from griffe import Extension, Object

# Code between fences and lines at a prompt get no links.
_CODE_OR_NAME = re.compile(
    r"^ *```.*?^ *```$|^ *(?:>>>|\.\.\.) [^\n]*$|(?<![`\[])`fo\.([\w.]*\w)[^`\n]*`", re.DOTALL | re.MULTILINE
)
# A docstring may omit `fo.` of names that contain an underscore: other names are also words.
_NAME_IN_DOCSTRING = re.compile(r"(?<![`\[])`([a-z]+_\w+)`")
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
# `Returns:` holds prose here. griffe would read the text before a colon as a type.
_RETURNS = re.compile(r"^Returns:\n((?:(?: {4}.*)?\n)+)", re.MULTILINE)
_ENTRY = re.compile(r"^::: functorch_optim\.([\w.]+)$", re.MULTILINE)
_ENTRIES = {
    path.rpartition(".")[2]: path
    for page in Path(__file__).parent.glob("reference/*.md")
    for path in _ENTRY.findall(page.read_text())
}


def _link(found: re.Match[str]) -> str:
    return f"[{found[0]}][functorch_optim.{found[1]}]" if found[1] else found[0]


def _link_in_docstring(found: re.Match[str]) -> str:
    return f"[{found[0]}][functorch_optim.{_ENTRIES[found[1]]}]" if found[1] in _ENTRIES else found[0]


def _in_prose(returns: re.Match[str]) -> str:
    items = re.sub(r"^(\w+): ", r"- `\1`: ", textwrap.dedent(returns[1]), flags=re.MULTILINE)
    return f"**Returns:**\n\n{items.strip()}\n\n"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Link the names in a page."""
    return _CODE_OR_NAME.sub(_link, markdown)


class Docstrings(Extension):
    """Links names and papers in docstrings, and lets griffe read our `Returns:` and `Example:`."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            text = _RETURNS.sub(_in_prose, text + "\n")
            text = _NAME_IN_DOCSTRING.sub(_link_in_docstring, _CODE_OR_NAME.sub(_link, text))
            obj.docstring.value = _ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
