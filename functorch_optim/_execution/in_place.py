"""In place: rules that overwrite the parameters and states which are given up to them."""

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.rule import Rule
from functorch_optim._execution import blocks
from functorch_optim._execution.blocks import Blocks, Cut, Room, empty_like, layout_of, lies
from functorch_optim._execution.foreach import foreach
from functorch_optim._execution.kernel import pure
from functorch_optim._execution.program import record
from functorch_optim._execution.representation import Columns, as_reals, cast, map_columns, widened
from functorch_optim._execution.ways import can_batch
from functorch_optim._execution.writing import is_expanded, share_memory

Way: TypeAlias = Literal["fused", "foreach", "blocks"] | None
"""How a user wants a step to be run; None: as is best."""


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


ADD = Rule(None, lambda u, state, p, s: (p + u, state), elementwise=True, needs_params=True, sparse="dense")
"""The last rule of a step: it makes of an update the new parameter."""


class InPlace:
    """Elementwise rules over parameters and states that are given up to them, for many steps.

    It is made before anything is written: the rules are recorded, and compiled if they are to be.

    Args:
        rules: the links of a chain.
        params: parameters.
        states: for each rule, its states for these parameters.
        scalars: for each rule, the numbers of a step.
        way: how to run them.
    """

    needs_scalars: ClassVar[bool] = True

    def __init__(
        self, rules: Sequence[Rule], params: list[Tensor], states: Sequence[Columns], scalars: Sequence[Any], way: Way
    ) -> None:
        self.rules = [*rules, ADD]
        self.params = [as_reals(param.detach()) for param in params]
        self.states = [*[map_columns(as_reals, state) for state in states], ()]
        self.columns = [self.params, *[column for state in self.states for column in state]]
        self.original = params[0].dtype
        self.like = widened(self.params[0].new_empty(0))
        self.converted = cast(self.like, self.original, to_number=True, as_pairs=True)
        self.room = Room(self.like.device)
        if way is None and self.like.device.type != "cpu":
            way = "foreach"
        numbers = iter(self._numbers(scalars))
        self.program = record(
            self.rules, self.states, True, tree.map(lambda _: next(numbers), [*scalars, ()]), self.like
        )
        self.in_place = ("p", *self.program.inputs[2:])
        self.compiled = self._compiled(scalars) if way == "fused" else None
        self.foreach = way == "foreach"
        if not self.foreach:
            layouts = [layout_of(param) for param in self.params]
            self.mirrors: list[tuple[Tensor, Tensor]] = []  # tensors that lie otherwise, and copies that lie right
            columns = [self._lying(column, layouts) for column in self.columns]
            length = None if self.compiled else blocks.BLOCK
            self.blocks = Blocks(self.program.dtype, columns, layouts, length, blocks.SMALL)
            self.cuts = [self.blocks.cut(column) for column in columns]
            self.blocks.reserve(len(self.program.inputs), self.room)
            if not self.compiled:
                blocks.reserve(self.program, self.blocks, self.cuts[0], self.in_place, self.room)

    def ready(self, updates: list[Tensor], scalars: Sequence[Any], step: float) -> Callable[[], None]:
        """Get ready for a step: take the memory that it needs, and change nothing.

        Args:
            updates: one for each parameter.
            scalars: for each rule, the numbers of this step.
            step: its number, which these rules do not need besides.

        Returns:
            What makes the step.
        """
        updates = [as_reals(update) for update in updates]
        if self.foreach:
            # Batch by batch, for what is computed takes as much memory as what is there.
            return functools.partial(self._run_foreach, updates, [*tree.map(self.converted, list(scalars)), ()])
        numbers = self._numbers(scalars)
        inputs = [self.blocks.cut(updates, to_read=True), *self.cuts]
        if self.compiled is not None:
            run = functools.partial(self._run_compiled, self.compiled, inputs, self._together(numbers))
        else:
            run = functools.partial(
                blocks.run, self.program, self.blocks, inputs, self.cuts, self.in_place, numbers, self.room
            )

        def overwrite() -> None:
            for tensor, mirror in self.mirrors:
                mirror.copy_(tensor)
            run()
            for tensor, mirror in self.mirrors:
                tensor.copy_(mirror)

        return overwrite

    def _lying(self, column: list[Tensor], layouts: list[Tensor]) -> list[Tensor]:
        """Replace tensors that do not lie in memory as their parameter does by copies."""
        lying = []
        for tensor, layout in zip(column, layouts, strict=True):
            if lies(tensor, layout):
                lying.append(tensor)
            else:
                lying.append(empty_like(tensor, layout))
                self.mirrors.append((tensor, lying[-1]))
        return lying

    def _numbers(self, scalars: Sequence[Any]) -> list[Any]:
        return [self.converted(scalar) for scalar in tree.flatten(list(scalars))[0]]

    def _run_foreach(self, updates: list[Tensor], numbers: list[Any]) -> None:
        starts = {tensor.data_ptr() for column in self.columns for tensor in column}
        for some in _batches(self.params):
            picked = [map_columns(None, state) for state in self.states]
            for state, mine in zip(self.states, picked, strict=True):
                for column, chosen in zip(state, mine, strict=True):
                    chosen += [widened(column[i]) for i in some]
            params = [widened(self.params[i]) for i in some]
            new_params, new_states = foreach(self.rules, [widened(updates[i]) for i in some], picked, params, numbers)
            new = [new_params, *[column for state in new_states for column in state]]
            # What moves from one to another must not have been overwritten when it is written.
            new = [[n.clone() if n.data_ptr() in starts else n for n in news] for news in new]
            for column, news in zip(self.columns, new, strict=True):
                torch._foreach_copy_([column[i] for i in some], news)

    def _run_compiled(self, kernel: Callable[..., None], inputs: Sequence[Cut], together: Tensor) -> None:
        overwritten = [self.program.inputs.index(name) for name in self.in_place]
        for row in zip(*[cut.alone for cut in inputs], strict=True):
            kernel(*row, together)
        for copies in self.blocks.joined(inputs, list(zip(self.cuts, overwritten, strict=True)), self.room):
            kernel(*copies, together)

    def _together(self, numbers: list[Any]) -> Tensor:
        dtype, device = self.like.dtype, self.like.device
        if not any(isinstance(number, Tensor) and number.device.type != "cpu" for number in numbers):
            return torch.tensor([float(number) for number in numbers], dtype=dtype).to(device, non_blocking=True)
        there = [n.to(device, dtype) if isinstance(n, Tensor) else self.like.new_full((), n) for n in numbers]
        return torch.stack(there)

    def _compiled(self, scalars: Sequence[Any]) -> Callable[..., None] | None:
        """Compile the program, and try it; warn when that fails."""
        source = pure(self.program, self.in_place)
        if source in _not_compiled:
            return None
        samples = [self.like.new_zeros(2 * blocks.SMALL) for _ in self.program.inputs]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's own
                function = _compiled(source)
                function(*samples, self._together(self._numbers(scalars)))
        except Exception as error:
            _not_compiled.add(source)
            cause = getattr(error, "inner_exception", error)
            reason = (str(cause).strip().splitlines() or [""])[0]
            warnings.warn(
                f"fused=True needs torch.compile and a compiler that works here, but there was a {type(cause).__name__}"
                f": {reason}. Steps are made without; leave fused=True out, or install a compiler (g++ on Linux)",
                stacklevel=2,
            )
            return None
        return function


_not_compiled: "weakref.WeakSet[Callable[..., None]]" = weakref.WeakSet()
"""Where that failed; nobody wants to be told so at every step."""


@functools.lru_cache(maxsize=256)
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function, dynamic=True, fullgraph=True)


def _batches(tensors: Sequence[Tensor], largest: int = 1 << 24) -> list[list[int]]:
    """Part tensors into lists of at most so many elements, where several are in one, for temporaries are as large."""
    batches: list[list[int]] = [[]]
    filled = 0
    for i, tensor in enumerate(tensors):
        if batches[-1] and filled + tensor.numel() > largest:
            batches.append([])
            filled = 0
        batches[-1].append(i)
        filled += tensor.numel()
    return batches


def can_donate(
    rules: Sequence[Rule],
    updates: list[Tensor],
    states: Sequence[Columns],
    params: list[Tensor],
    scalars: Sequence[Any],
) -> bool:
    """Tell whether rules can overwrite parameters and states."""
    written = [*params, *[tensor for state in states for column in state for tensor in column]]
    numbers = [leaf for leaf in tree.flatten(list(scalars))[0] if isinstance(leaf, Tensor)]
    return (
        all(rule.elementwise for rule in rules)
        and can_batch([*updates, *params], states, scalars)
        and all(number.ndim == 0 for number in numbers)
        and not any(tensor.layout != torch.strided or tensor.is_inference() for tensor in (*updates, *written))
        and not any(tensor.is_conj() or tensor.is_neg() for tensor in (*updates, *written))
        and not any(is_expanded(tensor) for tensor in written)
        and not share_memory(updates, written)
    )
