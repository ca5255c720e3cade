"""Small transformations: the parts of chains."""
