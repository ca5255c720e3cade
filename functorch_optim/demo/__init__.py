"""A demonstration on real data, handwritten digits: run `python -m functorch_optim.demo`."""
