"""A package of a compiled graph, made one callable."""
