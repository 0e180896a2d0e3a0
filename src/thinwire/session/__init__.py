"""The clock of a run: sessions, steps that are all or nothing, checkpoints, and what the optimizer hands over."""
