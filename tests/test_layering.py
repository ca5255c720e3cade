"""A file imports only from those above it in this list; nobody imports upwards, and optimizers not each other."""

import ast
import pathlib

import pytest

import functorch_optim

ROOT = pathlib.Path(functorch_optim.__file__).parent
LAYERS = [
    "tree",
    "numerics",
    "stand_in",
    "known",
    "per_parameter",
    "control",
    "recorded",
    "hyperparameters",
    "rule",
    "checks",
    "vector",
    "execution.representation",
    "execution.ways",
    "execution.writing",
    "execution.tensor_list",
    "execution.reference",
    "execution.foreach",
    "execution.program",
    "execution.kernel",
    "execution.blocks",
    "execution.recomputed",
    "execution.flat",
    "execution.in_place",
    "execution",
    "links",
    "passes",
    "lift",
    "layout",
    "base",
    "stepping",
    "saving",
    "combine",
    "schedules.schedule",
    "schedules.pieces",
    "schedules.stairs",
    "schedules",
    "transforms.scaling",
    "transforms.zeros",
    "transforms.decay",
    "transforms.momentum",
    "transforms.clipping",
    "transforms.plateau",
    "optimizers.descent",
    "optimizers.line_search",
    "optimizers.limited_memory",
    "optimizers",
    "meta.krylov",
    "meta.solvers",
    "meta.derivative",
    "meta.capture",
    "meta.rematerialization",
    "meta.unrolling",
    "meta.root",
    "meta.implicit",
    "meta.forward",
    "meta.zero_order",
    "meta.fast_weights",
    "meta",
    "optim.native",
    "optim.plan",
    "optim.steady",
    "optim.loading",
    "optim.factories",
    "optim.base",
    "optim.wrapper",
    "optim.torch_like",
    "optim.classes",
    "optim.lbfgs",
    "optim",
    "convert",
    "testing.comparison",
    "testing.copies",
    "testing.strategies",
    "testing.derivatives",
    "testing.problem",
    "testing.report",
    "testing.properties",
    "testing.transformation",
    "testing.optimizer_class",
    "testing.oracles",
    "testing",
    "demo",
]
FILES = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]


def module_of(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def layer_of(module):
    names = [name for name in LAYERS if module == name or module.startswith(f"{name}.")]
    assert names or module == "transforms", f"{module} has no place in the list of layers"
    return LAYERS.index(max(names, key=len)) if names else -1


def imports_of(path):
    """Name the modules of this library that a file imports, and all other packages."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inside = node.module == "functorch_optim"
            yield from (f"functorch_optim.{alias.name}" for alias in node.names) if inside else [node.module]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_one_way(path):
    module = module_of(path)
    for imported in imports_of(path):
        package, _, name = imported.partition(".")
        if package == "functorch_optim" and not module.startswith("demo"):
            above, here = layer_of(name), layer_of(module)
            # A package may look into its own files, and they may name it to import each other.
            allowed = above < here or name.startswith(f"{module}.") or module.startswith(f"{name}.")
            assert allowed, f"{module} imports {name}"
        if package == "optree":
            assert module == "tree", f"{module} imports optree"


def test_the_list_is_of_files_that_exist():
    modules = {module_of(path) for path in FILES}
    assert [name for name in LAYERS if not any(m == name or m.startswith(f"{name}.") for m in modules)] == []


def test_at_run_time_only_torch_and_optree():
    standard = {
        "ast",
        "collections",
        "contextlib",
        "dataclasses",
        "functools",
        "inspect",
        "itertools",
        "math",
        "numbers",
        "operator",
        "sys",
        "typing",
        "warnings",
        "weakref",
    }
    for path in FILES:
        if not module_of(path).startswith(("demo", "testing")):
            packages = {name.partition(".")[0] for name in imports_of(path)}
            assert packages <= standard | {"torch", "optree", "functorch_optim"}, path
