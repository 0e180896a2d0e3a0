"""Integrations with frameworks that wrap the model in DDP themselves; each is imported only when used."""
