"""A group: tensors of one dtype and device, the rules that are run over them, and the machine."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.checks import Path, check_kept
from functorch_optim._core.rule import ADD
from functorch_optim._execution import choose, writing
from functorch_optim._execution.choose import Machine, Way
from functorch_optim._execution.foreach import Overwriting
from functorch_optim._execution.mode import Mode, wants_derivatives, without_autocast
from functorch_optim._execution.program import needed
from functorch_optim._execution.recording import record
from functorch_optim._execution.reference import Stage
from functorch_optim._execution.representation import (
    Columns,
    as_it_is,
    as_reals,
    cast,
    each,
    like,
    make,
    map_columns,
    narrowed,
    row,
    widened,
    zip_columns,
)
from functorch_optim._execution.wholes import Wholes

Kinds: TypeAlias = tuple[type | bool, ...]
"""The traits of numbers that a program depends on: a known condition itself, else the type; () where all are floats."""


class Group:
    """Rules over tensors of one dtype and device.

    Args:
        stages: the rules.
        sample: one of the updates.
        path: names a tensor, for messages.
        mode: how torch treats tensors.
        plain: whether all tensors are plain, and none wants a derivative.
        together: whether they are plain but for a dispatch mode, and sharded: all ranks choose as without it.
        way: the user's choice of how to run.
        still: whether nothing moves: the update is not needed.
        keeps: whether the tensors that are overwritten stay the same, so that the cuts of them are kept.
        wholes: how whole tensors are made of these; None where they are whole.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        sample: Tensor,
        path: Path,
        mode: Mode,
        plain: bool,
        together: bool,
        way: Way,
        still: bool,
        keeps: bool,
        wholes: Wholes | None = None,
    ) -> None:
        self.stages, self.path, self.mode, self.way, self.still, self.keeps = stages, path, mode, way, still, keeps
        plain = plain or (together and any(stage.rule.norms for stage in stages))
        self.plain, self.wholes = plain, wholes
        self.dtype, self.device, self.is_complex = sample.dtype, sample.device, sample.is_complex()
        reduces = plain and sample.device.type == "cpu" and not self.is_complex and (wholes is None or wholes.adds)
        self.shards = None if wholes is None or wholes.layouts[0] is None else wholes
        self.by_tensor = _runs([stage.rule.elementwise for stage in stages], stages)
        takes_norms = reduces and any(stage.rule.norms for stage in stages)
        as_program = [stage.rule.elementwise or stage.rule.norms for stage in stages]
        self.runs = _runs(as_program, stages) if takes_norms else self.by_tensor
        self.one_program = plain and len(self.runs) == 1 and self.runs[0].elementwise and sample.layout == torch.strided
        self.moves = stages[-1].rule is ADD
        self.like = widened(
            torch.empty(0, dtype=sample.real.dtype if self.is_complex else sample.dtype, device=sample.device)
        )
        self.converted = cast(self.like, sample.dtype, to_number=True, as_pairs=True)
        self.machines: dict[Any, Machine] = {}
        self.kept: tuple[list[Tensor], Sequence[Columns]] | None = None  # parameters and states that stay the same
        self.bound: dict[Kinds, Overwriting] = {}

    def compute(
        self, updates: list[Tensor], params: list[Tensor] | None, states: Sequence[Columns], scalars: Sequence[Any]
    ) -> tuple[list[Tensor] | None, list[Columns]]:
        """Run the rules into new tensors.

        Returns:
            Updates, or the new parameters if the last rule adds; None where nothing moves. And the new states.
        """
        if updates[0].layout == torch.sparse_coo:
            return self._compute_touched(updates[0], params, states, scalars)
        if self.wholes is not None:
            rules = [stage.rule for stage in self.stages]
            scalars = [self.wholes.numbers(s, r.elementwise) for s, r in zip(scalars, rules, strict=True)]
        known = self._numbers(scalars)
        few = self.runs is not self.by_tensor and self.shards is None and choose.norms_by_tensor(updates)
        runs = self.by_tensor if few else self.runs
        if self.one_program and runs is self.runs and known is not None:
            inputs = self._inputs(updates, params, states)
            outputs = self._machine("new", runs[0], inputs, states, scalars, *known).new(inputs, known[0])
            return self._restored(outputs, updates, params, states)
        with without_autocast(self.device.type):
            eagerly = self.plain and known is not None
            return self._compute_by_rules(runs, updates, params, states, scalars, eagerly)

    def overwrite(
        self, updates: list[Tensor], params: list[Tensor], states: Sequence[Columns], scalars: Sequence[Any]
    ) -> Callable[[], None] | None:
        """Get ready to overwrite parameters and states: take the memory for it, and change nothing.

        Returns:
            Function that overwrites them; None where that cannot be done.
        """
        if updates[0].layout == torch.sparse_coo:
            return self._overwrite_touched(updates[0], params, states, scalars)
        known = self._numbers(scalars)
        if not self.one_program or known is None:
            return None
        numbers, kinds = known
        bound = self.bound.get(kinds)
        if bound is None:
            if self.kept is not None:
                params, states = self.kept
            elif not writing.can_overwrite(updates, [params, *[column for state in states for column in state]]):
                return None
            inputs = self._inputs(updates, params, states)
            bound = self._machine("over", self.runs[0], inputs, states, scalars, numbers, kinds).over(inputs[1:])
            if self.keeps:
                self.kept, self.bound[kinds] = (params, states), bound
        return bound([as_reals(u) for u in updates] if self.is_complex else updates, numbers)

    def _numbers(self, scalars: Sequence[Any]) -> tuple[list[Any], Kinds] | None:
        """List the numbers of rules as programs take them, and their kinds.

        Returns:
            None where no program can run: for one that differs between elements or wants a derivative, say.
        """
        numbers: list[Any] = []
        for s in scalars:
            if isinstance(s, tuple):
                numbers += s
            else:
                numbers.append(s)
        if all([type(number) is float for number in numbers]):  # noqa: C419 as nearly always
            return numbers, ()
        if not self.plain:
            return None
        numbers = tree.flatten(list(scalars))[0]
        for number in numbers:
            if isinstance(number, Tensor) and (
                number.ndim > 0
                or (number.requires_grad and self.mode == "recorded")
                or not writing.is_plain_type(number)
            ):
                return None
        converted = [self.converted(number) for number in numbers]
        kinds = [n if isinstance(n, bool) else type(c) for n, c in zip(numbers, converted, strict=True)]
        return converted, tuple(kinds)

    def _inputs(
        self, updates: list[Tensor], params: list[Tensor] | None, states: Sequence[Columns]
    ) -> list[list[Tensor]]:
        inputs = [updates, *([] if params is None else [params]), *[column for state in states for column in state]]
        return [[as_reals(tensor) for tensor in column] for column in inputs] if self.is_complex else inputs

    def _machine(
        self,
        use: str,
        run: "_Run",
        inputs: list[list[Tensor]],
        states: Sequence[Columns],
        scalars: Sequence[Any],
        numbers: list[Any],
        kinds: Kinds,
    ) -> Machine:
        """Choose the machine for a run of elementwise rules, once for the kinds of numbers."""
        key = (use, *run.members, kinds)
        if key not in self.machines:
            stages = run.stages
            with_params = len(inputs) > 1 + sum([len(state) for state in states])
            structure = tree.flatten(list(scalars))[1]
            given = [k if isinstance(k, bool) else n for k, n in zip(kinds, numbers, strict=True)] if kinds else numbers
            program = record(stages, states, with_params, tree.unflatten(structure, given), self.like)
            if self._is_still(run):
                outputs = program.outputs[1:]
                kept = needed(program.instructions, outputs)
                program = replace(program, outputs=outputs, instructions=kept, updates=False)
            sizes = [tensor.numel() for tensor in inputs[0]]
            self.machines[key] = choose.machine(program, sizes, numbers, self.way, use == "over", self.shards)
        return self.machines[key]

    def _is_still(self, run: "_Run") -> bool:
        """Tell whether the update after a run is not needed; runs after another one may need theirs."""
        return self.still and run.members[-1] == len(self.stages) - 1

    def _restored(
        self,
        outputs: list[list[Tensor]],
        updates: list[Tensor],
        params: list[Tensor] | None,
        states: Sequence[Columns],
    ) -> tuple[list[Tensor] | None, list[Columns]]:
        """Arrange the outputs of a program as updates and states."""
        new = iter(outputs)
        first = None if self.still else next(new)
        columns = [type(state)(*[next(new) for _ in state]) if state else state for state in states]
        if self.is_complex:
            first = None if first is None else [like(one, old) for one, old in zip(first, updates, strict=True)]
            columns = [zip_columns(like, one, old) for one, old in zip(columns, states, strict=True)]
        return first, columns

    def _compute_by_rules(
        self,
        runs: Sequence["_Run"],
        updates: list[Tensor],
        params: list[Tensor] | None,
        states: Sequence[Columns],
        scalars: Sequence[Any],
        eagerly: bool,
    ) -> tuple[list[Tensor] | None, list[Columns]]:
        """Run rules as they are; elementwise ones between others as programs, where no derivative is wanted."""
        new_updates = each(widened, updates)
        new_states = [map_columns(widened, state) for state in states]
        wide_params = each(widened, params) if params is not None else None
        given = [*updates, *(params or ()), *[tensor for state in states for column in state for tensor in column]]
        versions = writing.versions(given) if eagerly else []
        recalled: dict[int | None, Any] = dict.fromkeys([run.recalls for run in runs])
        for run in runs:
            elementwise, members, stages, source, recalls = run
            if members[0] in recalled:
                recalled[members[0]] = new_updates
            handed = wide_params if recalls is None else recalled[recalls]
            if source is not None and wide_params is not None:
                holder, hands = source
                handed = [hands(p, row(new_states[holder], i)) for i, p in enumerate(wide_params)]
            own = [new_states[k] for k in members]
            numbers = [scalars[k] for k in members]
            rules = functools.partial(self._results, run, numbers, eagerly, new_updates[0])
            if elementwise or self.wholes is None:
                new_updates, columns = rules(new_updates, own, handed, self.path)
            else:
                used = any([stage.rule.needs_params for stage in stages])  # noqa: C419
                arguments = members, new_updates, own, handed if used else None, self.path
                derivatives = not eagerly and wants_derivatives([*given, *tree.flatten(numbers)[0]])
                new_updates, columns = self.wholes.run(rules, *arguments, derivatives)
            for k, column in zip(members, columns, strict=True):
                new_states[k] = column
        if eagerly and versions != writing.versions(given):
            names = ", ".join([stage.rule.name for stage in self.stages])
            raise TypeError(f"A rule must not modify its arguments, but one of these did: {names}")
        likes = params if self.moves and params is not None else updates  # updates may be wider than parameters
        updated = [narrowed(new, old) for new, old in zip(new_updates, likes, strict=True)]
        new_states = [zip_columns(narrowed, new, old) for new, old in zip(new_states, states, strict=True)]
        return None if self.still else updated, new_states

    def _results(
        self,
        run: "_Run",
        scalars: list[Any],
        eagerly: bool,
        sample: Tensor,
        updates: list[Tensor],
        states: list[Columns],
        params: list[Tensor] | None,
        path: Path,
    ) -> tuple[list[Tensor], list[Columns]]:
        """Run the rules of one run, and check their results."""
        elementwise, members, stages, *_ = run
        view = as_reals if elementwise and self.is_complex else as_it_is
        arguments = (
            each(view, updates),
            [map_columns(view, state) for state in states],
            each(view, params) if params is not None else None,
        )
        if elementwise and eagerly:
            inputs = [arguments[0], *([arguments[2]] if arguments[2] is not None else [])]
            inputs += [column for state in arguments[1] for column in state]
            known: Any = self._numbers(scalars)
            outputs = iter(self._machine("new", run, inputs, arguments[1], scalars, *known).new(inputs, known[0]))
            results = arguments[0] if self._is_still(run) else next(outputs)
            columns = [make(type(s), [next(outputs) for _ in s]) for s in arguments[1]]
        else:
            converted = cast(sample, self.dtype, to_number=eagerly, as_pairs=elementwise)
            results, columns = choose.differentiable(self.mode, stages, *arguments, tree.map(converted, scalars))
        names = ", ".join([self.stages[k].rule.name for k in members])
        check_kept(f"The update after {names}", results, arguments[0], path)
        if view is as_reals:
            results = [like(new, old) for new, old in zip(results, updates, strict=True)]
            columns = [zip_columns(like, c, state) for c, state in zip(columns, states, strict=True)]
        for k, column, state in zip(members, columns, states, strict=True):
            for field, before, after in zip(getattr(column, "_fields", ()), state, column, strict=True):
                check_kept(f"The state's {field} after {self.stages[k].rule.name}", after, before, path)
        return results, columns

    # Sparse updates: elementwise rules are run on the entries that they have. -----------------------------------------

    def _touched(
        self, update: Tensor, params: list[Tensor] | None, states: Sequence[Columns], scalars: Sequence[Any]
    ) -> tuple[Tensor, list[Tensor], list[Columns]]:
        update = update.coalesce()
        indices = tuple(update.indices())

        def touched(dense: Tensor) -> Tensor:
            return dense[indices]

        def numbers(scalar: Any) -> Any:
            is_for_each = isinstance(scalar, Tensor) and scalar.ndim > 0
            return touched(scalar.expand(update.shape)) if is_for_each else scalar

        values = update.values()
        inner = Group(self.stages, values, self.path, self.mode, self.plain, False, self.way, self.still, keeps=False)
        new, some = inner.compute(
            [values],
            [touched(p) for p in params] if params is not None else None,
            [map_columns(touched, state) for state in states],
            tree.map(numbers, list(scalars)),
        )
        return update, new or [], some

    def _compute_touched(
        self, update: Tensor, params: list[Tensor] | None, states: Sequence[Columns], scalars: Sequence[Any]
    ) -> tuple[list[Tensor] | None, list[Columns]]:
        update, new, some = self._touched(update, params, states, scalars)
        indices = tuple(update.indices())
        columns = [
            zip_columns(lambda n, o: o.index_put(indices, n), n, old) for n, old in zip(some, states, strict=True)
        ]
        if self.still:
            return None, columns
        if self.moves and params is not None:
            return [params[0].index_put(indices, new[0])], columns
        sparse = torch.sparse_coo_tensor(
            update.indices(), new[0], update.shape, is_coalesced=True, check_invariants=False
        )
        return [sparse], columns

    def _overwrite_touched(
        self, update: Tensor, params: list[Tensor], states: Sequence[Columns], scalars: Sequence[Any]
    ) -> Callable[[], None] | None:
        if not self.plain or not writing.can_overwrite([], [params, *[column for state in states for column in state]]):
            return None
        update, new, some = self._touched(update, params, states, scalars)
        indices = tuple(update.indices())

        def step() -> None:
            for values in new:
                params[0].index_put_(indices, values)
            for fresh, old in zip(some, states, strict=True):
                for [tensor], [values] in zip(old, fresh, strict=True):
                    tensor.index_put_(indices, values)

        return step


class _Run(NamedTuple):
    """Stages that are run together, tensor by tensor or as a program.

    Attributes:
        elementwise: whether all of them are.
        members: their indices.
        stages: the stages; those that they refer to are among them, and counted from the first.
        source: the stage outside that hands all of them their parameters, and how; None where there is none.
        recalls: the stage outside whose update, as it was given, is their parameter; None where there is none.
    """

    elementwise: bool
    members: list[int]
    stages: list[Stage]
    source: tuple[int, Any] | None
    recalls: int | None


def _runs(as_program: Sequence[bool], stages: Sequence[Stage]) -> list[_Run]:
    """Part stages into runs: those that are recorded as programs, and others."""
    runs = []
    others = [(None if stage.source is None else stage.source[0], stage.recalls) for stage in stages]
    recalled = {stage.recalls for stage in stages}
    several = len(set(as_program)) > 1  # then an update that is recalled is one between two runs
    cuts = [several and len(recalled.intersection(range(n + 1))) for n in range(len(stages))]
    for (elementwise, _), alike in groupby(range(len(stages)), key=lambda k: (as_program[k], cuts[k])):
        together = list(alike)
        if {one for k in together for one in others[k]} <= {None, *together}:
            runs.append(_Run(elementwise, together, [stages[k].shifted(together[0]) for k in together], None, None))
            continue
        for _, some in groupby(together, key=others.__getitem__):
            members = list(some)
            first = stages[members[0]]
            alone = [Stage(stages[k].rule) for k in members]
            runs.append(_Run(elementwise, members, alone, first.source, first.recalls))
    return runs
