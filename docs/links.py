"""Links every `fo.name` in the documents and docstrings to its entry in the reference.

mkdocs loads this file twice: as a hook, which sees every page, and as an extension of griffe, which sees every docstring.
Names that have no entry are warnings, which `mkdocs build --strict` does not let pass.
"""

import re
from typing import Any

from griffe import Extension, Object

# Blocks of code stay as they are: those between fences, and in docstrings those with a prompt.
_CODE_OR_NAME = re.compile(r"^```.*?^```|^ *(?:>>>|\.\.\.) .*?$|(?<!\[)`fo\.([A-Za-z_.]+)[^`\n]*`", re.DOTALL | re.MULTILINE)


def _link(found: re.Match[str]) -> str:
    return f"[{found[0]}][functorch_optim.{found[1]}]" if found[1] else found[0]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Link the names in a page."""
    return _CODE_OR_NAME.sub(_link, markdown)


class Docstrings(Extension):
    """Reads our docstrings: links their names, and takes `Example:` for what griffe calls `Examples:`."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = _CODE_OR_NAME.sub(_link, text)
