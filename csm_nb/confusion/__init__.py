"""Stages 04 and 05: who was heard as what, inputs compared, verdicts."""
