"""Steps of optimizers that torch.optim lacks, against the packages that have them; and what matrices cost."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from torch.utils.flop_counter import FlopCounterMode

import functorch_optim as fo
from benchmarks.calls import one_thread
from benchmarks.measure import Comparison, Unit, Way, cpu_seconds, value
from benchmarks.shapes import Setting, Shapes
from benchmarks.stateful import call, stepping

GFLOP = Unit("GFLOP", 1e-9)
CYCLE = 10
"""Steps of a matrix optimizer that are timed together: SOAP and Shampoo renew their bases and roots at one of them."""


class Peer(NamedTuple):
    """An optimizer of a package.

    Attributes:
        name: module and class.
        options: of the class, beside the parameters.
        ours: options of the factory that make it the same.
        group: entries of the param group that the class needs.
    """

    name: str
    options: Mapping[str, Any] = MappingProxyType({})
    ours: Mapping[str, Any] = MappingProxyType({})
    group: Mapping[str, Any] = MappingProxyType({})

    def make(self, params: Any) -> Any:
        """Make the optimizer; it trains, where it must be told so."""
        module, _, name = self.name.rpartition(".")
        optimizer = getattr(importlib.import_module(module), name)([{"params": params, **self.group}], **self.options)
        getattr(optimizer, "train", lambda: None)()
        return optimizer


ELEMENTWISE = {
    "lion": Peer("pytorch_optimizer.Lion"),
    "signum": Peer("pytorch_optimizer.SignSGD"),
    "adabelief": Peer("pytorch_optimizer.AdaBelief"),
    "adan": Peer("pytorch_optimizer.Adan"),
    "ademamix": Peer("pytorch_optimizer.AdEMAMix"),
    "simplified_ademamix": Peer("pytorch_optimizer.SimplifiedAdEMAMix"),
    "adopt": Peer("pytorch_optimizer.ADOPT"),
    "laprop": Peer("pytorch_optimizer.LaProp"),
    "yogi": Peer("pytorch_optimizer.Yogi"),
    "grams": Peer("pytorch_optimizer.Grams"),
    "madgrad": Peer("pytorch_optimizer.MADGRAD"),
    "adai": Peer("pytorch_optimizer.Adai"),
    "ranger": Peer("pytorch_optimizer.Ranger", {"use_gc": False}),
    "schedule_free_adamw": Peer("schedulefree.AdamWScheduleFree"),
    "schedule_free_sgd": Peer("schedulefree.SGDScheduleFree"),
    "prodigy": Peer("prodigyopt.Prodigy"),
    "dadapt_adam": Peer("pytorch_optimizer.DAdaptAdam"),
    "dadapt_sgd": Peer("pytorch_optimizer.DAdaptSGD", {"momentum": 0.0}),
    "dog": Peer("dog.DoG"),
}
NORMS = {
    "lamb": Peer("pytorch_optimizer.Lamb"),
    "lars": Peer("pytorch_optimizer.LARS"),
    "ldog": Peer("dog.LDoG"),
    "stable_adamw": Peer("pytorch_optimizer.StableAdamW", {"kahan_sum": False}),
    "adanorm": Peer("pytorch_optimizer.AdaNorm"),
    "novograd": Peer("pytorch_optimizer.NovoGrad"),
    "fromage": Peer("pytorch_optimizer.Fromage"),
}
BY_TENSOR = {
    "adamp": Peer("pytorch_optimizer.AdamP"),
    "sgdp": Peer("pytorch_optimizer.SGDP", {"momentum": 0.9}, {"momentum": 0.9}),
    "adafactor": Peer("torch.optim.Adafactor"),
    "came": Peer("pytorch_optimizer.CAME"),
    "sm3": Peer("pytorch_optimizer.SM3", {"momentum": 0.9}),
}


def packages(setting: Setting) -> Iterator[Comparison]:
    """One step, as it is and fused, against the packages that have the optimizer: CPU time of one thread."""
    with one_thread():
        [(case, shapes)] = setting.shapes("resnet")
        few = 2 if setting.quick else None
        for name, peer in [*list(ELEMENTWISE.items())[:few], *list(NORMS.items())[:few]]:
            yield beside(setting, name, peer, case, shapes, 1.0)
            yield beside(setting, name, peer, case, shapes, 0.5, fused=True)
        for name, peer in list(BY_TENSOR.items())[:few]:
            yield beside(setting, name, peer, case, shapes, 1.0)


def beside(
    setting: Setting, name: str, peer: Peer, case: str, shapes: Shapes, bar: float, **options: Any
) -> Comparison:
    """Compare an optimizer with that of a package."""
    ours = stepping(lambda params: fo.Optimizer(params, made(name, peer), **options), setting, shapes)
    work = f"fo.{call(name, dict(peer.ours))}" + (", fused" if options else "")
    return Comparison(work, case, ours, {peer.name: stepping(peer.make, setting, shapes)}, bar, cpu_seconds)


def made(name: str, peer: Peer) -> fo.GradientTransformation:
    """Make the transformation that is the same as a peer."""
    transformation: fo.GradientTransformation = getattr(fo, name)(**peer.ours)
    return transformation


# Matrices. ------------------------------------------------------------------------------------------------------------


def newton_schulz(n: int, m: int, iterations: int = 5) -> int:
    """Count the operations of iterations on a matrix: X X^T, its square, and the product of both with X."""
    n, m = sorted((n, m))
    return iterations * (4 * n * n * m + 2 * n**3)


def two_sides(products: int) -> Callable[[int, int], int]:
    """Count products of a matrix with square ones on both sides, and of it with itself: each pair takes as much."""
    return lambda n, m: products * 2 * n * m * (n + m)


def power_iteration(n: int, m: int) -> int:
    """Count the four products of Dion, of full rank, without the QR decomposition."""
    return 4 * 2 * n * m * min(n, m)


MATRICES: dict[str, tuple[Peer | None, Callable[[int, int], int]]] = {
    "muon": (Peer("torch.optim.Muon"), newton_schulz),
    "normuon": (Peer("pytorch_optimizer.NorMuon", group={"use_muon": True}), newton_schulz),
    "scion": (Peer("pytorch_optimizer.SCION", {"momentum": 1.0}), newton_schulz),
    "dion": (None, power_iteration),
    "soap": (Peer("pytorch_optimizer.SOAP"), two_sides(4)),
    "shampoo": (
        Peer("pytorch_optimizer.Shampoo", {"preconditioning_compute_steps": CYCLE}, {"frequency": CYCLE}),
        two_sides(2),
    ),
}


def flops(setting: Setting) -> Iterator[Comparison]:
    """Matrices: CPU time of ten steps on one thread; and operations of one step's products, against a formula."""
    with one_thread():
        [(case, shapes)] = setting.shapes("layer")
        for name, (peer, formula) in MATRICES.items():
            same = peer or Peer("")
            ours = stepping(lambda params, n=name, p=same: fo.Optimizer(params, made(n, p)), setting, shapes)
            theirs = {} if peer is None else {peer.name: stepping(peer.make, setting, shapes)}
            work = f"fo.{call(name, dict(same.ours))}"
            timed = {label: partial(repeating, way) for label, way in theirs.items()}
            yield Comparison(
                f"{work}: {CYCLE} steps", case, partial(repeating, ours), timed, 1.0 if timed else None, cpu_seconds
            )
            expected = sum([formula(*shape) for shape in shapes])
            yield Comparison(
                f"{work}: products",
                case,
                partial(counting, ours),
                {"by formula": lambda e=expected: lambda: float(e)},
                1.0,
                value,
                GFLOP,
                rounds=1,
            )


def repeating(way: Way) -> Callable[[], None]:
    """Return the function that does the steps of a cycle."""
    step = way()

    def cycle() -> None:
        for _ in range(CYCLE):
            step()

    return cycle


def counting(way: Way) -> Callable[[], float]:
    """Return the function that counts the operations of the third step's products; that of decompositions is none."""
    step = way()
    step()
    step()

    def count() -> float:
        with FlopCounterMode(display=False) as counter:
            step()
        return float(counter.get_total_flops())

    return count
