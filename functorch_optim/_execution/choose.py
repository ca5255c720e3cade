"""The choice of a machine: the only place that chooses, and that has thresholds.

| rules, on tensors | machine |
|---|---|
| elementwise ones, on plain tensors of which no derivative is wanted | a recorded program: |
| - overwriting, one of torch's fused kernels computes it, alone or before an average of the new parameters; unless `fused=False` or `foreach` is given | native |
| - the same into new tensors, all of them small | native, on copies |
| - `fused=True`, and no kernel of torch's computes it | fused, compiled once; in blocks where that fails |
| - `foreach=True`; on a GPU; or few small tensors on the CPU | foreach |
| - `fused=False` or `foreach=False`; all else on the CPU | in blocks |
| elementwise ones but for norms of their tensor, on plain tensors of the CPU; into new tensors only if one is large | reduced: a program in blocks, once for the norms and once for the results; overwriting large ones with `fused=True`, both compiled |
| sums over all tensors that numbers of rules need, on plain tensors of the CPU | in blocks; with `fused=True`, large tensors by a compiled function |
| elementwise ones, on many small tensors that are differentiated or vmapped | flat: once on all of them, end to end |
| elementwise ones, on large tensors that autograd differentiates | recomputed in backward |
| rules that need their tensor whole and say that they may be stacked, on small tensors of one shape | stacked |
| all others: in a trace of torch.compile, on tensor subclasses, for rules that need their tensor whole | tensor by tensor |
| of sharded tensors (DTensor) | the same, on their local shards |
"""  # noqa: E501

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor

from functorch_optim._execution import blocks, flat, fused, native, recomputed
from functorch_optim._execution.blocks import InBlocks
from functorch_optim._execution.flat import can_join
from functorch_optim._execution.foreach import Foreach, Overwriting
from functorch_optim._execution.mode import Mode, Plain
from functorch_optim._execution.program import Program
from functorch_optim._execution.recomputed import can_recompute
from functorch_optim._execution.reduced import Reduced
from functorch_optim._execution.reference import Stage, tensor_by_tensor
from functorch_optim._execution.representation import Columns
from functorch_optim._execution.stacked import can_stack, stacked
from functorch_optim._execution.sums import in_blocks
from functorch_optim._execution.wholes import Wholes

FEW = 32
"""Tensors up to which foreach calls cost less than the copies that put small tensors together."""

Way: TypeAlias = Literal["fused", "foreach", "blocks"] | None
"""A user's choice of how a step is run; None: the best."""


class Machine(Protocol):
    """Runs a program over lists of tensors."""

    def new(self, inputs: Sequence[list[Tensor]], numbers: Sequence[Any]) -> list[list[Tensor]]:
        """Run into new tensors.

        Args:
            inputs: a list of tensors for each input of the program.
            numbers: those of the program.

        Returns:
            A list of tensors for each output.
        """

    def over(self, columns: Sequence[list[Tensor]]) -> Overwriting:
        """Get ready to overwrite parameters and states: all inputs but the first."""


def way_of(options: Mapping[str, Any]) -> Way:
    """Read from options named as torch.optim's how a step is to be run."""
    if options.get("fused"):
        return "fused"
    if options.get("foreach") is not None:
        return "foreach" if options["foreach"] else "blocks"
    return None if options.get("fused") is None else "blocks"


def check_options(options: Mapping[str, Any]) -> None:
    """Raise when options named as torch.optim's contradict each other, with torch's messages.

    Raises:
        RuntimeError: they do.
    """
    if options.get("fused") and options.get("foreach"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if options.get("fused") and options.get("differentiable"):
        raise RuntimeError("`fused` does not support `differentiable`")


def norms_by_tensor(updates: Sequence[Tensor]) -> bool:
    """Tell whether rules that take norms make new tensors faster as they are: of small ones."""
    return all([update.numel() < blocks.SMALL for update in updates])  # noqa: C419


def machine(
    program: Program,
    sizes: Sequence[int],
    numbers: Sequence[Any],
    way: Way,
    overwrites: bool,
    shards: Wholes | None = None,
) -> Machine:
    """Choose the machine for a program.

    Args:
        program: the program.
        sizes: numbers of elements of the tensors.
        numbers: those of the program.
        way: the user's choice.
        overwrites: whether parameters and states are given up.
        shards: how tensors are sharded, where these are shards.
    """
    if program.takes_norms:
        large = any([size >= blocks.SMALL for size in sizes])  # noqa: C419
        return Reduced(program, shards, compiles=way == "fused" and overwrites and large)
    small = [size < blocks.SMALL for size in sizes]
    on_cpu = program.device.type == "cpu"
    if way == "foreach" or (way is None and (not on_cpu or (all(small) and (not overwrites or len(sizes) <= FEW)))):
        chosen: Machine = Foreach(program, numbers)
    elif way is None and not overwrites and any(small):
        chosen = Parted(small, Foreach(program, numbers), InBlocks(program))
    else:
        chosen = InBlocks(program)
    if way in ("foreach", "blocks") or not (overwrites or (way is None and all(small) and on_cpu)):
        return chosen
    found = native.match(program)
    if found is not None and (found.kernel.states or found.gradient == "g"):  # p + n (m g) is two calls as it is
        return native.Native(program, found, chosen, numbers)
    compiles = way == "fused" and len(program.instructions) > 1  # of one call there is nothing to fuse
    return (fused.compiled(program) or chosen) if compiles else chosen


def sums(terms: Callable[..., Any], columns: Sequence[Sequence[Tensor]], numbers: Sequence[Any]) -> list[float] | None:
    """Choose how to add terms over all elements; None: tensor by tensor, as torch's functions do.

    Args:
        terms: elementwise function of a tensor of each column, and of the numbers; it returns a tensor, or several.
        columns: lists of tensors of the same shapes.
        numbers: the numbers.
    """
    plain = all([isinstance(column, Plain) and column for column in columns])  # noqa: C419
    known = all([type(number) is float for number in numbers])  # noqa: C419
    if not plain or not known or columns[0][0].device.type != "cpu":
        return None
    fuses = columns[0].fuses  # type: ignore[attr-defined]
    large = any([tensor.numel() >= blocks.SMALL for tensor in columns[0]])  # noqa: C419
    return in_blocks(terms, columns, numbers, compiles=fuses and large)


class Parted:
    """Runs a program by one machine over some tensors, and by another over the others."""

    def __init__(self, which: Sequence[bool], one: Machine, other: Machine) -> None:
        self.which, self.one, self.other = which, one, other

    def new(self, inputs: Sequence[list[Tensor]], numbers: Sequence[Any]) -> list[list[Tensor]]:
        """Run into new tensors."""
        outputs = []
        for machine, on in ((self.one, True), (self.other, False)):
            some = [[t for t, which in zip(column, self.which, strict=True) if which == on] for column in inputs]
            outputs.append([iter(column) for column in machine.new(some, numbers)])
        return [[next(one if which else other) for which in self.which] for one, other in zip(*outputs, strict=True)]

    def over(self, columns: Sequence[list[Tensor]]) -> Overwriting:
        """Get ready to overwrite parameters and states."""
        return InBlocks.over(self.other, columns)  # type: ignore[arg-type]


def differentiable(
    mode: Mode,
    stages: Sequence[Stage],
    updates: list[Tensor],
    states: Sequence[Columns],
    params: list[Tensor] | None,
    scalars: Sequence[Any],
) -> tuple[list[Tensor], list[Columns]]:
    """Run rules in the way that is best where derivatives, batches or a trace are wanted."""
    if can_stack(mode, stages, updates, states, params):
        return stacked(stages, updates, states, params, scalars)
    if not all(stage.rule.elementwise for stage in stages):
        return tensor_by_tensor(stages, updates, states, params, scalars)
    if can_join(mode, updates, states, params, scalars):
        return flat.flat(mode, stages, updates, states, params, scalars)
    if can_recompute(mode, updates, states, params, scalars):
        return recomputed.recomputed(stages, updates, states, params, scalars)
    return tensor_by_tensor(stages, updates, states, params, scalars)
