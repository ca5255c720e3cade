"""The tasks of the zoo: networks on real data, and functions that are hard to minimize."""

import collections
import functools
import pydoc_data.topics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import functorch_optim as fo
from benchmarks.zoo import functions, networks
from functorch_optim.demo.data import load

HELD_OUT = 200  # digits for validation
CHARACTERS, TEXT = 48, 200_000  # kinds of characters; length of the text


class Task(NamedTuple):
    """A task: a network or function to train.

    Attributes:
        name: on the command line and in results.
        title: in words.
        steps: the budget: number of batches, one gradient each.
        target: loss that counts as reached.
        init: seed -> parameters.
        batches: (seed, steps) -> what each step is given: (steps, ...).
        loss: (parameters, what a step is given) -> number.
        validation: parameters -> loss by which rates are compared.
        error: parameters -> number on test data, of which less is better.
        measured: what `error` is, in words.
        decays: whether weight decay is swept too.
    """

    name: str
    title: str
    steps: int
    target: float
    init: Callable[[int], Any]
    batches: Callable[[int, int], Tensor]
    loss: Callable[[Any, Tensor], Tensor]
    validation: Callable[[Any], Tensor]
    error: Callable[[Any], Tensor]
    measured: str
    decays: bool = False


class Split(NamedTuple):
    """Inputs, and the outputs that a network shall learn."""

    x: Tensor
    y: Tensor


class Data(NamedTuple):
    """Data for the three purposes."""

    training: Split
    validation: Split
    test: Split


@functools.cache
def digits() -> Data:
    """Return the digits of scikit-learn: 1237, 200 and 360."""
    rest, test = [Split(*part) for part in load()]
    held_out, training = [Split(*parts) for parts in zip(*[t.tensor_split([HELD_OUT]) for t in rest], strict=True)]
    return Data(training, held_out, test)


@functools.cache
def images() -> Data:
    """Return the digits, each to be reproduced."""
    return Data(*[Split(x, x) for x, _ in digits()])


@functools.cache
def text() -> Data:
    """Return pieces of Python's documentation, which comes with Python; a tenth each for validation and test."""
    written = "".join(pydoc_data.topics.topics.values()).lower()[:TEXT]
    common = [character for character, _ in collections.Counter(written).most_common(CHARACTERS - 1)]
    codes = {character: code for code, character in enumerate(common)}
    coded = torch.tensor([codes.get(character, CHARACTERS - 1) for character in written])
    pieces = coded.unfold(0, networks.LENGTH + 1, 1)
    tenth = len(pieces) // 10
    parts = pieces.tensor_split([len(pieces) - 2 * tenth, len(pieces) - tenth])
    few = [parts[0], *[part[:: 8 * networks.LENGTH] for part in parts[1:]]]
    return Data(*[Split(part[:, :-1], part[:, 1:]) for part in few])


def of_network(
    name: str,
    title: str,
    make: Callable[[], nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor],
    data: Data,
    *,
    steps: int,
    batch: int,
    target: float,
    error: Callable[[Tensor, Tensor], Tensor],
    measured: str,
    decays: bool = False,
) -> Task:
    """Make the task to train a network on batches of data."""
    skeleton = make()

    def init(seed: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return fo.params_of(make())

    def batches(seed: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(len(data.training.x), (count, batch), generator=generator)

    def judged(judge: Callable[[Tensor, Tensor], Tensor], split: Split) -> Callable[[Any], Tensor]:
        return lambda params: judge(torch.func.functional_call(skeleton, params, (split.x,)), split.y)

    def of_batch(params: Any, chosen: Tensor) -> Tensor:
        return judged(loss, Split(data.training.x[chosen], data.training.y[chosen]))(params)

    return Task(
        name,
        title,
        steps,
        target,
        init,
        batches,
        of_batch,
        judged(loss, data.validation),
        judged(error, data.test),
        measured,
        decays,
    )


def of_function(
    name: str,
    title: str,
    function: Callable[[Any], Tensor],
    init: Callable[[torch.Generator], Any],
    *,
    steps: int,
    target: float,
    error: Callable[[Any], Tensor] | None = None,
    measured: str = "value",
) -> Task:
    """Make the task to minimize a function, which has no data."""
    return Task(
        name,
        title,
        steps,
        target,
        lambda seed: init(torch.Generator().manual_seed(seed)),
        lambda seed, count: torch.zeros(count),
        lambda params, _: function(params),
        function,
        error or function,
        measured,
    )


def wrong(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of digits that are not recognized."""
    return (logits.argmax(-1) != labels).double().mean()


def of_characters(logits: Tensor, following: Tensor) -> Tensor:
    """Return the mean cross-entropy of a character, in nats."""
    return cross_entropy(logits.flatten(0, -2), following.flatten())


@functools.cache
def all_tasks() -> dict[str, Task]:
    """Return the tasks by name."""
    classification: dict[str, Any] = {"error": wrong, "measured": "digits not recognized"}
    tasks = [
        of_network(
            "digits_mlp",
            "digits, two hidden layers",
            networks.mlp,
            cross_entropy,
            digits(),
            steps=200,
            batch=32,
            target=0.25,
            decays=True,
            **classification,
        ),
        of_network(
            "digits_cnn",
            "digits, two convolutions",
            networks.cnn,
            cross_entropy,
            digits(),
            steps=160,
            batch=32,
            target=0.25,
            decays=True,
            **classification,
        ),
        of_network(
            "digits_vit",
            "digits, a vision transformer",
            networks.vision_transformer,
            cross_entropy,
            digits(),
            steps=300,
            batch=32,
            target=0.4,
            **classification,
        ),
        of_network(
            "characters",
            "a language model of characters",
            functools.partial(networks.language_model, CHARACTERS),
            of_characters,
            text(),
            steps=200,
            batch=16,
            target=2.6,
            error=of_characters,
            measured="nats for a character",
        ),
        of_network(
            "autoencoder",
            "an autoencoder of digits",
            networks.autoencoder,
            mse_loss,
            images(),
            steps=240,
            batch=32,
            target=0.03,
            error=mse_loss,
            measured="squared error of a pixel",
        ),
        of_function(
            "equation",
            "a differential equation, float64",
            functions.residual,
            functions.tanh_network,
            steps=500,
            target=1e-2,
            error=functions.away_from_solution,
            measured="root mean square error",
        ),
        of_function(
            "quadratic",
            "a quadratic of condition 10⁴",
            functions.quadratic,
            functions.random_matrix,
            steps=500,
            target=0.0003,
        ),
        of_function(
            "rosenbrock",
            "Rosenbrock's function",
            functions.rosenbrock,
            functions.random_vector,
            steps=1000,
            target=1e-1,
        ),
    ]
    return {task.name: task for task in tasks}
