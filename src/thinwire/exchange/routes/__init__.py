"""Routes: the ways through the network that compute something on the way."""
