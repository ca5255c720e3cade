"""Every optimizer of the library on the same small tasks, over a wide range of learning rates."""
