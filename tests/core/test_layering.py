"""A file imports only from those above it in this list; nobody imports upwards, and optimizers only Adam."""

import ast
import pathlib

import pytest

import functorch_optim

ROOT = pathlib.Path(functorch_optim.__file__).parent
LAYERS = [
    "_numerics",
    "_random",
    "tree._structure",
    "tree._prefixes",
    "tree._access",
    "tree._arithmetic",
    "tree",
    "_modules",
    "_core.stand_in",
    "_control",
    "_core.recorded",
    "_core.leaf",
    "_core.injected",
    "_core.hyperparameters",
    "_core.rule",
    "_core.checks",
    "_core.vector",
    "_execution.representation",
    "_execution.mode",
    "_execution.sharded",
    "_execution.wholes",
    "_execution.writing",
    "_execution.reference",
    "_execution.program",
    "_execution.recording",
    "_execution.calls",
    "_execution.foreach",
    "_execution.kernel",
    "_execution.blocks",
    "_execution.fused",
    "_execution.torch_kernels",
    "_execution.native",
    "_execution.recomputed",
    "_execution.flat",
    "_execution.stacked",
    "_execution.norms",
    "_execution.reduced",
    "_execution.sums",
    "_execution.choose",
    "_execution.group",
    "_execution",
    "_core.links",
    "_core.numbers",
    "_core.leaves",
    "_core.shards",
    "_core.groups",
    "_core.prepare",
    "_core.initial",
    "_core.functional",
    "_core.transformation",
    "_core.leafwise",
    "_core.stepping",
    "_core.naming",
    "_core.places",
    "_core.saving",
    "_core.combine",
    "_core.parts",
    "_core",
    "schedules._schedule",
    "schedules._pieces",
    "schedules._stairs",
    "schedules._decay",
    "schedules",
    "transforms.scaling",
    "transforms.zeros",
    "transforms.decay",
    "transforms.momentum",
    "transforms.clipping",
    "transforms.norm_history",
    "transforms.normalizing",
    "transforms.constraints",
    "transforms.noise",
    "transforms.plateau",
    "projections",
    "optimizers._descent",
    "optimizers._whole",
    "optimizers._rectified",
    "optimizers._factored",
    "optimizers._curvature",
    "optimizers.adam",
    "optimizers._line_search",
    "optimizers._limited_memory",
    "optimizers._newton_schulz",
    "optimizers._sides",
    "optimizers._spectral",
    "optimizers",
    "optimizers.muon_with_adamw",
    "wrappers._wrapping",
    "wrappers",
    "optimizers.ranger",
    "meta._krylov",
    "meta._solvers",
    "meta._derivative",
    "meta._check",
    "meta._capture",
    "meta._elementary",
    "meta._exact",
    "meta._rematerialization",
    "meta._unrolling",
    "meta._root",
    "meta._implicit",
    "meta._forward",
    "meta._zero_order",
    "meta._fast_weights",
    "meta",
    "_minimize",
    "_lr_sweep",
    "_labels.parameters",
    "_labels.matching",
    "_labels.uses",
    "_labels.groups",
    "_labels",
    "optim._plan",
    "optim._step",
    "optim._loading",
    "optim._matching",
    "optim._helpers_of_torch",
    "optim._parts",
    "optim._factories",
    "optim._closure",
    "optim._rate",
    "optim._base",
    "optim._evaluation",
    "optim._migration",
    "optim._wrapper",
    "optim._torch_like",
    "optim._classes",
    "optim._lbfgs",
    "optim",
    "optim._convert",
    "_learning_rate",
    "_names",
    "_former",
    "testing._comparison",
    "testing._copies",
    "testing.strategies",
    "testing._derivatives",
    "testing._problem",
    "testing._report",
    "testing._properties",
    "testing._transformation",
    "testing._optimizer_class",
    "testing._oracles",
    "testing",
    "demo",
]
FILES = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]


def module_of(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {f"functorch_optim.{module_of(path)}" for path in FILES}


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
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from [name if name in MODULES else node.module for name in named]


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
            assert module == "tree._structure", f"{module} imports optree"


def test_the_list_is_of_files_that_exist():
    modules = {module_of(path) for path in FILES}
    assert [name for name in LAYERS if not any(m == name or m.startswith(f"{name}.") for m in modules)] == []


def test_at_run_time_only_torch_and_optree():
    standard = {
        "__future__",
        "ast",
        "collections",
        "contextlib",
        "copy",
        "dataclasses",
        "difflib",
        "fnmatch",
        "functools",
        "importlib",
        "inspect",
        "itertools",
        "math",
        "numbers",
        "operator",
        "re",
        "sys",
        "threading",
        "types",
        "typing",
        "warnings",
        "weakref",
    }
    for path in FILES:
        if not module_of(path).startswith(("demo", "testing")):
            packages = {name.partition(".")[0] for name in imports_of(path)}
            assert packages <= standard | {"torch", "optree", "functorch_optim"}, path
