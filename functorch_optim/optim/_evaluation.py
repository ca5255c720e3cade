"""The points at which an optimizer's parameters are: those that are trained, and those to evaluate with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from functorch_optim.optim import _factories as factories
from functorch_optim.optim import _matching as matching
from functorch_optim.optim._base import OptimizerBase

_TRAINED = "trained"
"""The entry of `state[p]` that holds the parameter which is trained, while p is another to evaluate with."""


class EvaluatingOptimizer(OptimizerBase):
    """An optimizer with `train`, `eval` and `averaged`, for wrappers that keep two sets of weights."""

    _evaluates = True

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Evaluate within: `with opt.averaged(): ...` is `eval` before and `train` after, errors or not.

        Raises:
            ValueError: nothing in the transformation has parameters to evaluate with.

        Example:
            >>> import functorch_optim as fo, torch
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> opt = fo.Optimizer(model.parameters(), fo.swa(fo.sgd, start=0), lr=1.0)
            >>> for _ in range(3):
            ...     opt.zero_grad()
            ...     model(torch.ones(1, 1)).sum().backward()
            ...     opt.step()
            >>> trained = model.weight.item()
            >>> with opt.averaged():
            ...     print(round(model.weight.item() - trained, 3))
            1.0
            >>> model.weight.item() == trained
            True
        """
        if not self._averages:
            raise ValueError(
                f"Nothing in {factories.name_of(self._transformation)} has parameters to evaluate with; write "
                "Optimizer(params, ema_weights(adamw(1e-3), decay=0.999)), or another wrapper that keeps two sets"
            )
        was_evaluating = self._evaluating
        self.eval()
        try:
            yield
        finally:
            if not was_evaluating:
                self.train()

    @torch.no_grad()
    def eval(self) -> None:
        """Write the average that a wrapper keeps to the parameters, to evaluate with it.

        `step` is an error until `train` has put back those that are trained, bit for bit. They are in `state[p]` until
        then, so that a checkpoint has both; it says the mode, as `train_mode` in its groups, and loading it restores
        the mode. Without such a wrapper nothing moves.
        """
        if self._evaluating:
            return
        moved = []
        for index in range(self._number_of_trees):
            plan = self._plan(index)
            for p, part in zip(plan.params, plan.parts, strict=True):
                state, new = self.state.get(p, {}), None
                for k, keys in zip(part.links, part.keys, strict=True):
                    evaluate = plan.links[k].rule.evaluate
                    if evaluate is not None and all(key in state for key in keys):  # the outermost is the last
                        new = evaluate(p, plan.state_type(k, p)(*[state[key] for key in keys]))
                if new is not None:
                    moved.append((p, p.detach().clone(), new))
        for p, trained, new in moved:
            self.state[p][_TRAINED] = trained
            p.copy_(new)
        self._evaluating = True

    @torch.no_grad()
    def train(self) -> None:
        """Put back the parameters that are trained."""
        for group in self.param_groups:
            for p in group["params"]:
                trained = self.state.get(p, {}).pop(_TRAINED, None)
                if trained is not None:
                    p.copy_(trained)
        self._evaluating = False

    @property
    def _averages(self) -> bool:
        """Whether some wrapper keeps two sets of weights; hyperparameters do not matter, and may be wrong now."""
        kept = self.__dict__.get("_plans", {})
        plans = [kept[index][1] if index in kept else self._plan(index) for index in range(self._number_of_trees)]
        return any(link.rule.evaluate is not None for plan in plans for link in plan.links)

    def state_dict(self) -> dict[str, Any]:
        """Return the state and the hyperparameters in plain containers; `torch.load(weights_only=True)` takes them.

        Hyperparameters that are functions, schedules say, transformations or generators belong to the program and are
        left out. Where a wrapper keeps two sets of weights, each group has `train_mode`: False while the parameters are
        those to evaluate with.
        """
        saved = super().state_dict()
        if self._averages or self._evaluating:
            for group in saved["param_groups"]:
                group[matching.MODE] = not self._evaluating
        return saved

    def _check_loaded(self, former: OptimizerBase, manner: matching.Manner) -> None:
        super()._check_loaded(former, manner)
        for index in range(self._number_of_trees):
            plan = self._plan(index)
            for i, p in enumerate(plan.params):
                trained = self.state.get(p, {}).get(_TRAINED)
                if trained is not None and getattr(trained, "shape", None) != p.shape:
                    raise ValueError(
                        f"The saved {_TRAINED} of parameter {plan.path(i)!r} is no tensor of shape {tuple(p.shape)}; "
                        "it was saved for another model"
                    )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_evaluating": self._evaluating}
