"""Steps like the one before: of the same tensors, with new gradients and numbers."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.passes import Bucket, Donations, scalars_of
from functorch_optim._core.rule import step_dtype
from functorch_optim._execution.ways import PLAIN
from functorch_optim.optim._plan import Plan, State


class Counted(NamedTuple):
    """Parameters that are at the same step.

    Attributes:
        members: their indices.
        step: number of updates that they have had.
        counters: the tensors that say so, one for each of them.
        carried: for each link, and each number that its scalars carry on, the tensors that have it.
    """

    members: list[int]
    step: float
    counters: list[Tensor]
    carried: list[list[list[Tensor]]]

    @property
    def tensors(self) -> list[Tensor]:
        """List all of them."""
        return [*self.counters, *[t for numbers in self.carried for tensors in numbers for t in tensors]]


class Steady:
    """What a step has found out, for the next to use as long as nobody exchanges a tensor.

    Args:
        plan: of the step.
        donations: all that it did.
        buckets: the parameters that took part.
        state: of the optimizer, after it.
    """

    def __init__(self, plan: Plan, donations: Donations, buckets: list[Counted], state: Mapping[Any, State]) -> None:
        self.plan, self.donations, self.buckets = plan, donations, buckets
        self.moving = {i for bucket in buckets for i in bucket.members}
        self.states = [(p, state[p]) for i, p in enumerate(plan.params) if i in self.moving and p in state]
        self.tensors = [(s, key, value) for _, s in self.states for key, value in s.items()]
        self.params = [p for i, p in enumerate(plan.params) if i in self.moving]
        self.others = [p for i, p in enumerate(plan.params) if i not in self.moving]
        self.types = [type(p.grad) for p in self.params]
        self.kinds = [(p.shape, p.dtype, torch.strided) for p in self.params]
        self.numbers = [tensor for bucket in buckets for tensor in bucket.tensors]
        self.versions = [tensor._version for tensor in self.numbers]
        self.done = [bucket.step for bucket in buckets]
        self.used = [
            sorted(
                {k for d in donations if d.bucket == number and d.work.needs_scalars for k in d.links}
                | {k for k, numbers in enumerate(bucket.carried) if numbers}
            )
            for number, bucket in enumerate(buckets)
        ]
        written = [plan.params[i] for i in self.moving] + [value for *_, value in self.tensors]
        self.written = [tensor for tensor in written if isinstance(tensor, Tensor)]
        self.places = [tensor.data_ptr() for tensor in self.written]
        self.contiguous = [tensor for tensor in self.written if tensor.is_contiguous()]
        self.scattered = [tensor for tensor in self.written if not tensor.is_contiguous()]
        self.strides = [tensor.stride() for tensor in self.scattered]
        self.starts = {tensor.data_ptr() for tensor in self.written if tensor.numel()}
        self.storages = set(map(_storage, self.written))

    @classmethod
    def after(cls, plan: Plan, donations: Donations, state: Mapping[Any, State]) -> "Steady | None":
        """Return what is known after a step; None where the next cannot be like it."""
        if not donations or not donations.complete or plan.count is int:
            return None
        if any(type(plan.params[i].grad) not in PLAIN for members, _ in donations.buckets for i in members):
            return None
        buckets = []
        for members, _ in donations.buckets:
            part = plan.parts[members[0]]
            position = plan.completed(members[0], state.get(plan.params[members[0]], {}), plan.params[members[0]])[0]
            alike = all(
                plan.completed(i, state.get(plan.params[i], {}), plan.params[i])[0] == position for i in members
            )
            step, fresh, numbers = position
            if not alike or fresh or (numbers and any(plan.parts[i] is not part for i in members)):
                return None
            counters = [state[plan.params[i]]["step"] for i in members if plan.parts[i].counted and plan.count]
            keys = dict(zip(part.links, part.carried, strict=True))
            carried = [
                [[state[plan.params[i]][key] for i in members] for key in keys.get(k, ())]
                for k in range(len(plan.links))
            ]
            buckets.append(Counted(members, step, counters, carried))
        tensors = [tensor for bucket in buckets for tensor in bucket.tensors]
        if any(tensor.is_inference() or tensor.device.type != "cpu" for tensor in tensors):
            return None
        if any(t.dtype != step_dtype() for bucket in buckets for ks in bucket.carried for ts in ks for t in ts):
            return None
        return cls(plan, donations, buckets, state)

    def fits(self, state: Mapping[Any, State]) -> bool:
        """Tell whether all tensors are where they were, and the gradients are of the same kind."""
        grads: list[Any] = [p.grad for p in self.params]
        # Lists are compared whole, which takes a third of the time of a loop over parameters.
        return (
            list(map(type, grads)) == self.types
            and [(g.shape, g.dtype, g.layout) for g in grads] == self.kinds
            and not any(p.grad is not None for p in self.others)
            and not any(map(Tensor.is_conj, grads))
            and not any(map(Tensor.is_neg, grads))
            and self.starts.isdisjoint(map(Tensor.data_ptr, grads))
            and (not any(map(Tensor._is_view, grads)) or self.storages.isdisjoint(map(_storage, grads)))
            and [tensor._version for tensor in self.numbers] == self.versions
            and all([state.get(p) is s for p, s in self.states])  # noqa: C419
            and all([s.get(key) is value for s, key, value in self.tensors])  # noqa: C419
            and list(map(Tensor.data_ptr, self.written)) == self.places
            and all(map(Tensor.is_contiguous, self.contiguous))
            and list(map(Tensor.stride, self.scattered)) == self.strides
        )

    def prepare(self, extra: dict[str, Any]) -> Callable[[], None]:
        """Compute the numbers of the next step; change nothing.

        Returns:
            What makes the step.
        """
        plan = self.plan
        grads = [p.grad for p in plan.params]
        seen = []
        if any(self.used):
            seen = [g for g, on in zip(grads, plan.active[0], strict=True) if on and g is not None]
        evaluated = []
        for bucket, done, used in zip(self.buckets, self.done, self.used, strict=True):
            numbers = {}
            if used:
                carried = [tuple([tensors[0] for tensors in numbers]) for numbers in bucket.carried]
                at = Bucket(bucket.members, plan.steps(done), carried)
                numbers = scalars_of(plan.links, used, at, extra, seen)
            evaluated.append(numbers)
        overwrites = []
        for donated in self.donations:
            needed = donated.links if donated.work.needs_scalars else ()
            scalars = [evaluated[donated.bucket][k][0] for k in needed]
            step = self.done[donated.bucket] + 1
            overwrites.append(donated.work.ready([grads[i] for i in donated.members], scalars, step))

        def commit() -> None:
            for overwrite in overwrites:
                overwrite()
            for number, bucket in enumerate(self.buckets):
                for k, (_, new) in evaluated[number].items():
                    for tensors, value in zip(bucket.carried[k], new, strict=True):
                        torch._foreach_copy_(tensors, [value] * len(tensors))
                if bucket.counters:  # first, so that an interrupt leaves nothing here that they do not say
                    torch._foreach_copy_(bucket.counters, [torch.tensor(self.done[number] + 1)] * len(bucket.counters))
                    self.done[number] += 1
            self.versions = [tensor._version for tensor in self.numbers]

        return commit


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
