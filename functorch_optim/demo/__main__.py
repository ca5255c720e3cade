"""The command line of the demonstration."""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

PACKAGES = ("matplotlib", "numpy", "rich", "sklearn")
PICTURE = "functorch_optim_demo.png"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demonstration; a bad argument ends it with exit code 2, a missing package with exit code 1.

    Args:
        arguments: the command line without the program's name; by default that of this process.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: there is no cuda device here; choose cpu")
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        sys.exit(f'The demonstration needs {", ".join(missing)} too: pip install "functorch_optim[demo]"')
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / PICTURE).open("ab").close()  # a path that cannot be written fails now, not after the training
    except FileExistsError:
        parser.error(f"argument --out: {str(options.out)!r} is not a directory")
    except OSError as error:
        parser.error(f"argument --out: cannot write to {str(options.out)!r}: {error.strerror}")

    from functorch_optim.demo.show import show  # noqa: PLC0415 - it imports the packages

    show(options.out / PICTURE, options.device, options.seed, options.epochs)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m functorch_optim.demo",
        description="Train networks on handwritten digits in three ways: with pure functions, with an optimizer "
        "object, and sixteen at once with vmap. Prints a table and draws a picture.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help=f"directory for {PICTURE}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="seed of the weights and of the batches")
    parser.add_argument("--epochs", type=whole_number(1), default=20, help="how often each digit is trained with")
    return parser


def whole_number(smallest: int) -> Callable[[str], int]:
    """Make a function that turns text into a whole number, from the smallest that is allowed to 2^32 - 1."""
    largest = 2**32 - 1

    def number_in(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = smallest - 1  # out of range, for the message below
        if not smallest <= number <= largest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {smallest} to {largest}")
        return number

    return number_in


if __name__ == "__main__":
    main()
