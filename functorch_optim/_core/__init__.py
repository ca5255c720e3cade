"""What a transformation is, and how it is run over trees."""
