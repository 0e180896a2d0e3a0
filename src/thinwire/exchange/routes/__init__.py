"""Routes: the collectives that carry a message, with the computations between them."""
