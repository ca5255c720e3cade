"""What steps and derivatives cost, against torch.optim and others: `python -m benchmarks`."""
