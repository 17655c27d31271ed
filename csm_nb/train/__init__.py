"""A training: batches, loss, Trainer, checkpoints, self-check, selection, cost."""
