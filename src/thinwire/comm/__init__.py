"""Communication: collectives that carry bytes between workers and never look inside them."""
