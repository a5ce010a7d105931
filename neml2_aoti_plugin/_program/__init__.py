"""The segments of a model, evaluated over rows."""
