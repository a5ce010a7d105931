"""What neml2 sees of a compiled model."""
