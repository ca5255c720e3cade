"""The numbers of a step: the scalars of links, computed from the step, hyperparameters and extras."""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._control import is_known
from functorch_optim._core import injected
from functorch_optim._core.checks import Path
from functorch_optim._core.leaf import DiffersError, Leaf, marked, numbers_for
from functorch_optim._core.links import Link
from functorch_optim._core.rule import OF_TREE
from functorch_optim._execution.mode import PLAIN
from functorch_optim._execution.reference import Held, Masked
from functorch_optim._numerics import where
from functorch_optim.tree import Tree

Step = float | Tensor
Condition = bool | Tensor
"""Whether something is so: a bool, or a tensor where it is not known."""
NOT_WITH_FLOATS = (DiffersError, TypeError, AttributeError, ArithmeticError, ValueError)
"""Errors of scalars that floats cannot compute, or that differ between leaves."""


class Bucket(NamedTuple):
    """Leaves that have had the same number of updates.

    Attributes:
        members: their indices.
        steps: for each link, the number of this update, 1 at the first; None for a link that does not count.
        carried: for each link, the numbers that its scalars carry on: floats, or 0-dim tensors.
    """

    members: Sequence[int]
    steps: list[Step | None]
    carried: list[tuple[Step, ...]]


class Shares(NamedTuple):
    """Numbers that differ between leaves: lists of leaves, and the numbers of each list."""

    shares: list[tuple[list[int], Any]]


class Numbers:
    """Computes the numbers of links at each step, for leaves of one form.

    Args:
        links: of the transformation.
        active: for each link, whether it is for each leaf.
        shapes: of the leaves; None where there is no update.
        structure: of the tree of leaves.
        path: names a leaf, for messages.
    """

    def __init__(
        self,
        links: Sequence[Link],
        active: list[list[bool]],
        shapes: list[torch.Size | None],
        structure: Any,
        path: Path,
    ) -> None:
        self.links, self.active, self.shapes, self.structure, self.path = links, active, shapes, structure, path
        self.alone = structure is not None and tree.is_leaf(tree.unflatten(structure, range(len(shapes))))
        self.extras = [link.rule.extras for link in links]
        self.differs: set[int] = set()  # links whose numbers differ between leaves
        self.takes_tensors: set[int] = set()  # links whose scalars cannot compute with floats
        self.simple = [_of_step(link, extras) for link, extras in zip(links, self.extras, strict=True)]
        self.used: dict[tuple[int, int], list[int]] = {}

    def compute(
        self,
        members: Sequence[int],
        number: int,
        bucket: Bucket,
        extras: dict[str, Any],
        seen: dict[str, Any],
        carried: list[tuple[Step, ...]],
        due: list[Condition],
    ) -> dict[int, Any]:
        """Compute the numbers of links.

        Args:
            members: the links of a pass.
            number: of the bucket.
            bucket: the leaves, and their steps.
            extras: the keyword arguments of `update`.
            seen: the tensors that the first link asks for, if it sees the tree.
            carried: for each link, the numbers to carry on; written to.
            due: for each link, whether it runs at this step; written to.

        Returns:
            For each link that runs at this step, its numbers.
        """
        found: dict[int, Any] = {}
        for k in self.used.get((members[0], number)) or self._used(members, number, bucket):
            simple = self.simple[k]
            if simple is not None:
                try:
                    found[k] = simple(bucket.steps[k], **(seen if k == members[0] else {}))
                    continue
                except NOT_WITH_FLOATS:
                    pass  # computed again below, with tensors or leaf by leaf; other errors are the user's
            self._add(k, found, bucket, extras, seen, carried, due)
        return found

    def _add(
        self,
        k: int,
        found: dict[int, Any],
        bucket: Bucket,
        extras: dict[str, Any],
        seen: dict[str, Any],
        carried: list[tuple[Step, ...]],
        due: list[Condition],
    ) -> None:
        """Compute the numbers of a link, if it runs at this step."""
        link = self.links[k]
        rule: Any = link.rule
        is_open = due[k] = self._is_open(k, due)
        if is_open is False:
            return
        scalars: Any = ()
        if rule.scalars is not None:
            with self.reading(k, carried):
                scalars, new = self._evaluated(k, bucket, extras, seen)
            carried[k] = _chosen(is_open, new, carried[k])
        if rule.hold is not None:  # a gate tells the links inside whether they are due
            scalars, gate = scalars
            gate = _as_known(gate)
            due[k] = _both(is_open, gate)
            scalars = Held(scalars) if gate is False else scalars
        is_known = is_open is True and isinstance(due[k], bool)
        found[k] = scalars if is_known else Masked(scalars, is_open, due[k])

    def is_open_for_some(self, k: int, due: list[list[Condition]]) -> Condition:
        """Tell whether gates let a link run for some of the leaves.

        Args:
            k: the link.
            due: for each bucket and link, whether it runs at this step; written to.
        """
        found: Condition = False
        for conditions in due:
            conditions[k] = self._is_open(k, conditions)
            found = _either(found, conditions[k])
        return found

    def _is_open(self, k: int, due: Sequence[Condition]) -> Condition:
        """Tell whether all gates let a link run."""
        is_open: Condition = True
        for back in self.links[k].when:
            is_open = _both(is_open, due[k - back])
        return is_open

    def reading(self, k: int, carried: Sequence[tuple[Step, ...]]) -> AbstractContextManager[None]:
        """Let a link read the numbers that keepers keep for it."""
        backs = self.links[k].reads
        if not backs or not carried:
            return nullcontext()
        keepers: list[Any] = [self.links[k - back].rule for back in backs]
        return injected.reading({rule.keeps: carried[k - back] for rule, back in zip(keepers, backs, strict=True)})

    def _evaluated(
        self, k: int, bucket: Bucket, extras: dict[str, Any], seen: dict[str, Any]
    ) -> tuple[Any, tuple[Step, ...]]:
        """Compute the numbers of a link, and those that it carries on."""
        rule: Any = self.links[k].rule
        wanted = self.extras[k].wanted(extras) if self.extras[k].names or self.extras[k].any else {}
        if rule.sees_tree:
            wanted.update(seen)
        if k not in self.differs:
            try:
                return self._called(k, bucket, wanted)
            except DiffersError:
                self.differs.add(k)
                self.simple[k] = None
        return self._by_leaf(k, bucket, wanted)

    def _called(self, k: int, bucket: Bucket, wanted: dict[str, Any]) -> tuple[Any, tuple[Step, ...]]:
        """Call the scalars of a link: with floats where the step is known, if they can compute with floats."""
        rule, step, carried = self.links[k].rule, bucket.steps[k], bucket.carried[k]
        if k not in self.takes_tensors and not isinstance(step, Tensor):
            try:
                return _split(rule, step, carried, wanted)
            except DiffersError:
                raise
            except (ArithmeticError, ValueError):  # 1 / 0, say, which is inf in torch
                pass
            except (
                TypeError,
                AttributeError,
            ):  # functions of tensors alone; a mistake of the user fails with tensors, too, and raises below
                found = _split(rule, _wide(step), tuple(map(_as_tensor, carried)), wanted)
                self.takes_tensors.add(k)
                self.simple[k] = None
                return found
        return _split(rule, _wide(step), tuple(map(_as_tensor, carried)), wanted)

    def _by_leaf(self, k: int, bucket: Bucket, wanted: dict[str, Any]) -> tuple["Shares", tuple[Step, ...]]:
        """Compute the numbers of a link for each leaf; those with equal hyperparameters share theirs."""
        rule: Any = self.links[k].rule
        if rule.carry is not None:
            with marked():
                rule.check_shared(self._called(k, bucket, wanted)[1])
        numbered = tree.unflatten(self.structure, range(len(self.active[k])))
        prefixes = tree.Prefixes(numbered, "the values of a hyperparameter")
        shares: dict[Any, tuple[list[int], Any]] = {}
        read: list[Tree] | None = None
        carried = bucket.carried[k]
        for i in bucket.members:
            if not self.active[k][i] or self.shapes[i] is None:
                continue
            key = None if read is None else _equal([prefixes.of(values)[i] for values in read])
            if key is not None and key in shares:
                shares[key][0].append(i)
                continue
            now: list[Tree] = []
            value = functools.partial(_value_for, prefixes, i)
            path = functools.partial(self.path, i)
            leaf = Leaf(value, path, self.shapes[i], self.alone, rule.elementwise)  # type: ignore[arg-type]
            with numbers_for(leaf, now):
                found, carried = self._called(k, bucket, wanted)
            read = now
            shares[_equal([prefixes.of(values)[i] for values in read])] = ([i], found)
        return Shares(list(shares.values())), carried

    def _used(self, members: Sequence[int], number: int, bucket: Bucket) -> list[int]:
        """Find the links of a pass whose numbers are needed: for some leaf, or to be carried on."""
        here = [i for i in bucket.members if self.shapes[i] is not None]
        used = [k for k in members if bucket.carried[k] or any(self.active[k][i] for i in here)]
        self.used[members[0], number] = used
        return used


def read_number(number: Tensor, known: bool, more: int = 0) -> Any:
    """Read a number of a state, plus some: as a float where that is asked for and waits for no device."""
    if known and type(number) in PLAIN and number.device.type == "cpu" and not number.requires_grad:
        return float(number.item() + more)
    return number.to(torch.float64) + more if more else number


def _as_known(gate: Condition) -> Condition:
    """Return a condition as a bool where that waits for nothing, as under torch.func.grad: then one branch runs."""
    if isinstance(gate, bool) or not is_known(gate) or gate.device.type != "cpu":
        return gate
    return gate if torch._C._len_torch_dispatch_stack() > 0 else bool(gate)


def _of_step(link: Link, extras: Any) -> Callable[[Any], Any] | None:
    """Return the scalars of a link that need the step, and tensors of the tree, alone; None where others need more."""
    rule: Any = link.rule
    if rule.scalars is None and not link.when:
        return _nothing
    own = link.when or link.reads or rule.hold or rule.carry or extras.names - OF_TREE or extras.any
    return None if own else rule.scalars


def _nothing(step: Any) -> tuple[()]:
    return ()


def _both(one: Condition, other: Condition) -> Condition:
    if isinstance(one, bool):
        return other if one else False
    return one & other


def _either(one: Condition, other: Condition) -> Condition:
    if isinstance(one, bool):
        return True if one else other
    return one | other


def _chosen(condition: Condition, new: tuple[Step, ...], old: tuple[Step, ...]) -> tuple[Step, ...]:
    if condition is True:
        return new
    return tuple([where(condition, n, o) for n, o in zip(new, old, strict=True)])


def _split(rule: Any, step: Any, carried: tuple[Any, ...], wanted: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """Call the scalars of a rule; return its numbers, and those that it carries on."""
    if rule.carry is None:
        return rule.scalars(step, **wanted), carried
    scalars, new = rule.scalars(step, rule.carried_type(*carried), **wanted)
    return scalars, tuple(new)


def _wide(number: Any) -> Any:
    """Return a number as a float64 tensor."""
    if isinstance(number, Tensor):
        return number.to(torch.float64)
    return None if number is None else torch.tensor(number, dtype=torch.float64, device="cpu")


def _as_tensor(number: Any) -> Tensor:
    return number if isinstance(number, Tensor) else torch.tensor(number, dtype=torch.float64, device="cpu")


def _value_for(prefixes: tree.Prefixes, i: int, values: Tree) -> Any:
    return prefixes.of(values)[i]


def _equal(values: list[Any]) -> Any:
    """Return a key that hyperparameters share which are equal numbers, or the same tensors or functions."""
    return tuple([(type(v), v if isinstance(v, int | float) else id(v)) for v in values])
