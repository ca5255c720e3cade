"""Fixtures of the tests of steps."""

import contextlib
import functools
from unittest import mock

import pytest
import torch

from functorch_optim._execution import choose, fused, native


@pytest.fixture
def compiled(monkeypatch):
    """Let kernels be traced, but not compiled, and not be torch's own; list the graphs, and count the calls."""
    graphs, calls, machine = [], [], choose.machine

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @functools.cache
    def compile_it(function):
        made = torch.compile(function, dynamic=True, fullgraph=True, backend=backend)
        return lambda *args: calls.append(1) or made(*args)

    def chosen(program, sizes, numbers, way, overwrites, shards=None):
        none_found = mock.patch.object(native, "match", return_value=None)
        with none_found if way == "fused" else contextlib.nullcontext():
            return machine(program, sizes, numbers, way, overwrites, shards)

    monkeypatch.setattr(fused, "_compiled", compile_it)
    monkeypatch.setattr(choose, "machine", chosen)
    return graphs, calls
