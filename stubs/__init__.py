"""HIT inputs of the project, each with what is needed to compile and drive it."""
