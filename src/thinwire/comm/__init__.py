"""Communication: what carries bytes between workers and never looks inside them."""
