"""The step of an optimizer: prepared for the parameters, states and kinds of gradients that it finds."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.checks import check_updates
from functorch_optim._core.leaves import Leaves, Outcome
from functorch_optim._core.links import Link
from functorch_optim._core.numbers import Bucket, read_number
from functorch_optim._core.prepare import Prepared
from functorch_optim._core.rule import ADD, step_dtype
from functorch_optim._execution import mode as modes
from functorch_optim._execution import writing
from functorch_optim._execution.choose import Way
from functorch_optim._execution.mode import PLAIN, is_plain
from functorch_optim._execution.sharded import is_sharded, layout_of, local
from functorch_optim.optim._plan import Plan, Position, State


class _Counted(NamedTuple):
    """Parameters at one position.

    Attributes:
        bucket: these leaves and their steps, which are written to.
        keys: the key of the step of each link; None where it has none.
        done: for each key of a step, the number of updates done; written to.
        counters: for each key of a step, the tensors that hold it, one for each parameter.
        carried: for each link, and each number that its scalars carry on, the tensors that hold it. Where a step or a
            number is one for all parameters, those of all.
        now: a tensor to copy steps from.
    """

    bucket: Bucket
    keys: list[str | None]
    done: dict[str, float]
    counters: dict[str, list[Tensor]]
    carried: list[list[list[Tensor]]]
    now: Tensor


class _Computed(NamedTuple):
    """The results of a step besides those that it overwrites.

    Attributes:
        moved: parameters, and their next values; or where autograd records, their updates.
        entries: index of a parameter, key in its state, the tensor that is there, and its next value.
        whole: by link, the next states of functions of the whole tree.
    """

    moved: list[tuple[Tensor, Tensor]]
    entries: list[tuple[int, str, Tensor, Any]]
    whole: dict[int, Any]


class PreparedStep:
    """A step, prepared for these parameters and states, and gradients of these kinds.

    Args:
        plan: of the parameters.
        state: of the optimizer.
        tree_states: the states of functions of the whole tree, by link.
        way: the user's choice of how to run.
        rounds: whether the numbers that scalars carry on are rounded to the default dtype, whatever their own.
    """

    def __init__(
        self, plan: Plan, state: Mapping[Any, State], tree_states: dict[int, Any], way: Way, rounds: bool = False
    ) -> None:
        self.plan, self.mode, self.rounds = plan, modes.current(), rounds
        self.inference = torch.is_inference_mode_enabled()  # then only such steps may write to the kept tensors
        grads: list[Any] = [p.grad for p in plan.params]
        check_updates(grads, plan.params, plan.path)
        self.moving = [i for i, g in enumerate(grads) if g is not None]
        # While autograd records, results computed from the parameters must stay as they were.
        recorded = self.mode == "recorded"
        self.params = [p.clone() if recorded else p for p in plan.params]
        writing.check_writable([plan.params[i] for i in self.moving], lambda k: plan.path(self.moving[k]))
        groups: dict[Any, list[int]] = {}
        self.states: dict[int, State] = {}
        kept = writing.unshared(plan.params)  # an initial state may be a part of a parameter
        shared = plan.shared_numbers(state) if plan.sharing else {}
        with modes.lasting():
            still = [(i, state.get(p, {})) for i, p in enumerate(plan.params) if grads[i] is None]
            self.still = {i: plan.own_numbers(i, own) for i, own in still}
            for i, own in [(i, state.get(plan.params[i], {})) for i in self.moving]:
                position, completed = plan.completed(i, own, shared)
                self.states[i] = {key: v if own.get(key) is v else kept(v) for key, v in completed.items()}
                groups.setdefault(position, []).append(i)
        self.tree_states = {
            k: tree_states[k] if k in tree_states else plan.initial_tree_state(k)
            for k in (plan.whole if groups else ())
        }
        self.columns = [self._columns(k) for k in range(len(plan.links))]
        columns = [column for state in self.columns if isinstance(state, tuple) for column in state]
        tensors = [*grads, *plan.params, *[t for column in columns if isinstance(column, list) for t in column]]
        # Where one is in the memory of another, both of their updates are added to it.
        written = [plan.params[i] for i in self.moving]
        self.adds = (
            not recorded
            and is_plain(self.mode, list(map(local, tensors)))
            and not writing.share_memory([], list(map(local, written)))
        )
        links = (*plan.links, Link(ADD)) if self.adds else plan.links
        active = [*plan.active, [True] * len(grads)] if self.adds else plan.active
        if self.adds:
            self.columns.append(())
        leaves = Leaves(grads, self.params, self.columns)
        keeps = self.adds and not plan.whole  # a function of the whole tree may return a parameter for an update
        self.prepared = Prepared(
            links, plan.structure, plan.path, leaves, active, self.mode, way, overwrites=self.adds, keeps=keeps
        )
        self.shared = {k: self._shared(k) for k in plan.sharing}
        self.counted = [self._counted(position, members) for position, members in groups.items()]
        self.parted = bool(self.shared) and len(self.counted) > 1
        self.buckets = [counted.bucket for counted in self.counted]
        self.first = True  # until the states that were completed are the optimizer's
        self.equal: list[list[Tensor]] = []  # lists of tensors that hold one number each, all of a list the same
        self.numbers: list[Tensor] = []  # all of them
        self.whole: dict[int, Any] = {}  # states of functions of the whole tree after the last step, by link
        self.places: list[int] | None = None  # of the overwritten tensors, once a step was made
        self.values: list[Any] | None = None  # of numbers after the last step; unknown if that was interrupted

    def _columns(self, k: int) -> Any:
        """Collect the state of one link over all parameters."""
        plan = self.plan
        if k in plan.whole:
            return self.tree_states.get(k)
        users = [i for i in self.moving if k in plan.parts[i].links]
        if not users:
            return ()
        state_type = plan.state_type(k, plan.params[users[0]])
        columns: list[list[Any]] = [[None] * len(plan.params) for _ in getattr(state_type, "_fields", ())]
        for i in users:
            part = plan.parts[i]
            for column, key in zip(columns, part.keys[part.links.index(k)], strict=True):
                column[i] = self.states[i][key]
        return state_type(*columns) if columns else ()

    def _shared(self, k: int) -> list[list[Tensor]]:
        """Collect the tensors that hold the numbers of a link that are one for all parameters, still ones too."""
        users = sorted(self.plan.sharing[k], key=lambda user: user[0] in self.still)  # completed ones are right
        held = [((self.still if i in self.still else self.states)[i], keys) for i, keys in users]
        return [[own[keys[j]] for own, keys in held if keys[j] in own] for j in range(len(users[0][1]))]

    def _counted(self, position: Position, members: list[int]) -> _Counted:
        """Collect the tensors that say where parameters are."""
        plan = self.plan
        links: list[str | None] = [None] * len(plan.links)
        carried: list[list[list[Tensor]]] = [[] for _ in plan.links]
        for i in members:
            part = plan.parts[i]
            for k, key, names in zip(part.links, part.steps, part.carried, strict=True):
                links[k] = key
                carried[k] = carried[k] or [[] for _ in names]
                for tensors, name in zip(carried[k], names, strict=True):
                    tensors.append(self.states[i][name])
        done = dict(position.steps)
        counters = {
            key: [self.states[i][key] for i in members if key in self.states[i] and plan.count is not int]
            for key in done
        }
        for k, lists in self.shared.items():
            key, count = links[k], len(carried[k])
            if count:
                carried[k] = lists[:count]
            if count and key is not None and k in plan.of_tree:
                [counters[key]] = lists[count:]
        steps: list[Any] = [None] * len(self.columns)
        numbers: list[tuple[Any, ...]] = [()] * len(self.columns)
        for k, key in enumerate(links):
            if key is not None:
                steps[k] = 1.0 if k in position.fresh else done[key] + 1
            numbers[k] = self._read(carried[k])
        now = torch.zeros((), dtype=torch.float64, device="cpu")
        return _Counted(Bucket(members, steps, numbers), links, done, counters, carried, now)

    def compute(self, extra: dict[str, Any]) -> Outcome:
        """Compute the numbers of a step and all that is not overwritten; change nothing."""
        if not self.moving:
            return Outcome([None] * len(self.params), self.columns, [], [], [], False)
        grads = [p.grad for p in self.plan.params]
        return self.prepared.run(Leaves(grads, self.params, self.columns), self.buckets, extra)

    # Commit: only here anything is written. ---------------------------------------------------------------------------

    def commit(self, outcome: Outcome, state: dict[Any, State]) -> dict[int, Any]:
        """Make the step.

        Returns:
            New states of functions of the whole tree, by link.
        """
        rest = self._kept(outcome) if outcome.computed else None
        self.values = None
        if self.first:
            self._adopt(state)
        for overwrite in outcome.ready:
            overwrite()
        if rest is not None:
            self._write(rest, state)
        for n, counted in enumerate(self.counted):
            self._count(counted, outcome.due[n], outcome.carried[n], state)
        if self.parted:
            self._read_shared()
        if rest is not None:
            self.whole.update(rest.whole)
            for k, new in rest.whole.items():
                self.columns[k] = new
        self.remember(state)
        return {} if rest is None else rest.whole

    def _adopt(self, state: dict[Any, State]) -> None:
        """Let the states that were completed be the optimizer's."""
        for i, completed in (self.states | self.still).items():
            own = state.get(self.plan.params[i], {})
            new = {key: value for key, value in completed.items() if own.get(key) is not value}
            if new:  # a parameter without a state has no entry, as in torch.optim
                state[self.plan.params[i]].update(new)  # at once, whatever interrupts
        self.first = False

    def _kept(self, outcome: Outcome) -> "_Computed":
        """List the results, in memory of their own."""
        plan = self.plan
        moved = [(p, u) for p, u in zip(plan.params, outcome.updates, strict=True) if u is not None]
        entries = []
        for k in range(len(plan.links)):
            old, new = self.columns[k], outcome.columns[k]
            for i in () if new is old or k in plan.whole else self.moving:
                part = plan.parts[i]
                if k in part.links:
                    for key, before, after in zip(part.keys[part.links.index(k)], old, new, strict=True):
                        if after[i] is not before[i]:
                            entries.append((i, key, before[i], after[i]))
        whole = {k: outcome.columns[k] for k in plan.whole if self.moving}
        # A written tensor must share no memory with one that changes, or that is the user's.
        given = [*plan.params, *[p.grad for p in plan.params], *[v for s in self.states.values() for v in s.values()]]
        kept = writing.unshared(given)
        return _Computed(
            [(p, kept(u)) for p, u in moved],
            [(i, key, old, kept(new)) for i, key, old, new in entries],
            {k: tree.map(kept, new) for k, new in whole.items() if tree.flatten(new)[0]},
        )

    def _write(self, computed: "_Computed", state: dict[Any, State]) -> None:
        """Write the results; states into the old tensors, as torch.optim does: others may hold or share them."""
        for p, u in computed.moved:
            if self.adds:
                p.copy_(u)
            else:
                p.add_(u)
        rooms: list[tuple[Any, Any]] = []
        replaced: dict[int, State] = {}
        recorded = self.mode == "recorded"  # then autograd may hold the old ones, also where they have no derivative
        for i, key, old, new in computed.entries:
            if not recorded and writing.is_room_for(old, new):
                rooms.append((old, new))
            else:
                replaced.setdefault(i, {})[key] = new
        for i, entries in replaced.items():
            state[self.plan.params[i]].update(entries)
        writing.copy_([old for old, _ in rooms], [new for _, new in rooms])

    def _count(
        self, counted: _Counted, due: list[Any], carried: list[tuple[Any, ...]], state: dict[Any, State]
    ) -> None:
        """Write steps, and the numbers that scalars carry on; last, so that an interrupted step is not counted."""
        plan, steps = self.plan, counted.bucket.steps
        for k, lists in enumerate(counted.carried):
            if lists and carried[k] is not counted.bucket.carried[k]:  # it did run: no gate has left it out
                for j, tensors in enumerate(lists):
                    self._carry(counted, k, j, tensors, carried[k][j], state)
                if self.mode == "plain":
                    counted.bucket.carried[k] = self._read(lists)
        for key in {key for key, on in zip(counted.keys, due, strict=False) if key is not None and on}:
            counted.done[key] = counted.done[key] + 1 if plan.count is not None else 1.0
            if counted.counters[key]:
                counted.now.fill_(counted.done[key])
                torch._foreach_copy_(counted.counters[key], [counted.now] * len(counted.counters[key]))
            elif plan.count is int:
                for i in counted.bucket.members:
                    state[plan.params[i]][key] = int(counted.done[key])
        for k, name in enumerate(counted.keys):
            if name is not None:
                steps[k] = counted.done[name] + 1

    def _read_shared(self) -> None:
        """Read the numbers that are one for all parameters, where gates may have let only some of them write it."""
        for counted in self.counted:
            for k in self.shared:
                if counted.carried[k] and self.mode == "plain":
                    counted.bucket.carried[k] = self._read(counted.carried[k])
                key = counted.keys[k]
                if key is not None and k in self.plan.of_tree:
                    counted.done[key] = float(counted.counters[key][0])
                    counted.bucket.steps[k] = counted.done[key] + 1

    def _read(self, lists: list[list[Tensor]]) -> tuple[Any, ...]:
        """Read the numbers that a link carries on: as floats, if that loses no digits and nothing differentiates."""
        firsts = [tensors[0] for tensors in lists]
        return tuple([read_number(t, self.mode == "plain" and t.dtype == torch.float64) for t in firsts])

    def _carry(
        self, counted: _Counted, k: int, j: int, tensors: list[Tensor], new: Any, state: dict[Any, State]
    ) -> None:
        """Write a number that the scalars of a link carry on."""
        dtype = step_dtype() if self.rounds else tensors[0].dtype
        number = torch.as_tensor(new, dtype=dtype, device=tensors[0].device)
        if self.mode != "plain":  # then autograd may hold the old ones
            parts = self.plan.parts
            members = [(i, parts[i].carried[parts[i].links.index(k)]) for i in counted.bucket.members]
            for i, keys in self.plan.sharing.get(k, members):
                own = state.get(self.plan.params[i], {})
                if keys[j] in own:
                    own[keys[j]] = number.clone()
            return
        torch._foreach_copy_(tensors, [number] * len(tensors))

    # The next step. ---------------------------------------------------------------------------------------------------

    def remember(self, state: Mapping[Any, State]) -> None:
        """Note after a step where all tensors are, so that the next one may be made without looking for them."""
        if self.places is not None:
            self.values = self._written_values()
            return
        plan = self.plan
        self.equal = [
            tensors
            for counted in self.counted
            for lists in (counted.counters.values(), *counted.carried)
            for tensors in lists
            if tensors
        ]
        self.numbers = [tensor for tensors in self.equal for tensor in tensors]
        own = [plan.params[i] for i in self.moving]
        if (
            not (self.adds and own)
            or plan.count is int
            or any(type(local(p.grad)) not in PLAIN for p in own)
            or any(t.is_inference() or t.device.type != "cpu" or type(t) not in PLAIN for t in self.numbers)
        ):
            return
        self.own, self.others = own, [p for i, p in enumerate(plan.params) if i not in set(self.moving)]
        self.dicts = [(p, state[p]) for p in plan.params if p in state]  # still ones may share numbers
        # As they were prepared: those that were replaced meanwhile, having had no room, fit no more.
        known = [(plan.params[i], entries) for i, entries in self.states.items()]
        known += [(p, dict(state[p])) for p in self.others if p in state]
        self.entries = [(state[p], key, v) for p, some in known for key, v in some.items() if isinstance(v, Tensor)]
        grads = [local(p.grad) for p in own]
        self.types = list(map(type, grads))
        self.layouts = list(map(layout_of, [p.grad for p in own])) if any(map(is_sharded, own)) else None
        self.kinds = [(g.shape, p.dtype, torch.strided) for g, p in zip(grads, own, strict=True)]
        self.values = self._written_values()
        self.written = [*own, *[value for *_, value in self.entries]]
        self.shards = self.written if self.layouts is None else list(map(local, self.written))
        self.contiguous = [tensor for tensor in self.shards if tensor.is_contiguous()]
        self.scattered = [tensor for tensor in self.shards if not tensor.is_contiguous()]
        self.strides = list(map(Tensor.stride, self.scattered))
        self.starts = {tensor.data_ptr() for tensor in self.shards if tensor.numel()}
        self.storages = set(map(_storage, self.shards))
        self.places = list(map(Tensor.data_ptr, self.shards))

    def _written_values(self) -> list[Any]:
        """Read the numbers that were just written, one for each list of tensors."""
        return [value for tensors in self.equal for value in [tensors[0].item()] * len(tensors)]

    def fits(self, state: Mapping[Any, State], tree_states: Mapping[int, Any]) -> bool:
        """Tell whether all tensors are where they were after the last step, and the gradients are of the same kinds."""
        if self.places is None or torch.is_grad_enabled() or torch.is_inference_mode_enabled() is not self.inference:
            return False
        if any([tree_states.get(k) is not kept for k, kept in self.whole.items()]):  # noqa: C419
            return False
        grads: list[Any] = [p.grad for p in self.own]
        shards = self.shards
        if self.layouts is not None:
            if list(map(layout_of, grads)) != self.layouts:
                return False
            grads, shards = list(map(local, grads)), list(map(local, self.written))
        # Lists are compared whole, which takes a third of the time of a loop over parameters.
        return (
            list(map(type, grads)) == self.types
            and [(g.shape, g.dtype, g.layout) for g in grads] == self.kinds
            and not any([p.grad is not None for p in self.others])  # noqa: C419
            and not any(map(Tensor.is_conj, grads))
            and not any(map(Tensor.is_neg, grads))
            and self.starts.isdisjoint(map(Tensor.data_ptr, grads))
            and (not any(map(Tensor._is_view, grads)) or self.storages.isdisjoint(map(_storage, grads)))
            and list(map(Tensor.item, self.numbers)) == self.values  # not versions, which miss .data
            and all([state.get(p) is s for p, s in self.dicts])  # noqa: C419
            and all([s.get(key) is value for s, key, value in self.entries])  # noqa: C419
            and list(map(Tensor.data_ptr, shards)) == self.places
            and all(map(Tensor.is_contiguous, self.contiguous))
            and list(map(Tensor.stride, self.scattered)) == self.strides
        )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
