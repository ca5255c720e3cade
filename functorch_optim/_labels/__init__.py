"""Labels of parameters: masks, trees of numbers and param groups, by rules on paths, dimensions and modules."""
