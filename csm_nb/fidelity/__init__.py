"""Stage 00: whether the codec can carry the language at all."""
