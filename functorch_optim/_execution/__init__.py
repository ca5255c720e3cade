"""How rules are run over many tensors: the only folder that knows."""
