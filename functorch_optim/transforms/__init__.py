"""Small transformations: the blocks that chains are made of."""
