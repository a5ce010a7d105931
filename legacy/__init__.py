"""Real artifacts of old neml2 releases, built by those releases' own `neml2-compile`."""
