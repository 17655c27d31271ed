"""Speech from a model."""
