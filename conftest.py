"""Import the package before pytest imports one of its files for the examples, which would make its classes twice."""

import functorch_optim  # noqa: F401
