"""Pickles of version 0.1.0 name modules that stand elsewhere now; here they are found under their former names."""

import sys

_FORMER = {
    "combine": "_core.combine",
    "recorded": "_core.recorded",
    "rule": "_core.rule",
    "optim.classes": "optim._classes",
    "optim.lbfgs": "optim._lbfgs",
    "optim.wrapper": "optim._wrapper",
    **{
        f"schedules.{name}": f"schedules._{name}"
        for name in ("combine", "cycles", "decay", "phases", "pieces", "stairs")
    },
}

sys.modules["functorch_optim.base"] = sys.modules["functorch_optim"]  # all of it that pickles name is public
for _old, _new in _FORMER.items():
    sys.modules[f"functorch_optim.{_old}"] = sys.modules[f"functorch_optim.{_new}"]
