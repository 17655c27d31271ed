"""A training: packed rows, loss, Trainer, checkpoints, self-check, selection, cost."""
