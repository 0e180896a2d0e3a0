"""The optimizers that are the user's: which they are, what moves out of them, what they load, what they step with."""
