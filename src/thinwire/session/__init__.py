"""Sessions of attached models: the step clock, all-or-nothing steps, checkpoints, and the link to the optimizer."""
