"""Newton's method over rows."""
