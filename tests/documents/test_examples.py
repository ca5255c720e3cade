"""Examples in docstrings of public names begin with what they need: they run where they are pasted."""

import ast
import builtins
import doctest
import inspect

import pytest

import functorch_optim as fo
from functorch_optim import testing

MODULES = {"fo": fo, "meta": fo.meta, "optim": fo.optim, "projections": fo.projections, "schedules": fo.schedules}
MODULES |= {"testing": testing, "tree": fo.tree}


def examples():
    """Yield the examples of public names, and of the methods of public classes."""
    for name, module in MODULES.items():
        for member in module.__all__:
            value = getattr(module, member)
            owned = [value, *vars(value).values()] if inspect.isclass(value) else [value]
            text = "\n".join(
                example.source
                for one in owned
                if getattr(one, "__module__", "").startswith("functorch_optim")
                for example in doctest.DocTestParser().get_examples(inspect.getdoc(one) or "")
            )
            if text:
                yield pytest.param(text, id=f"{name}.{member}")


def names(tree):
    """Return the names that are read in a program, and those that it binds."""
    nodes = list(ast.walk(tree))
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler)}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return read, bound


@pytest.mark.parametrize("text", list(examples()))
def test_an_example_has_what_it_needs(text):
    read, bound = names(ast.parse(text))
    assert not read - bound - set(dir(builtins))
