"""Frameworks that wrap a model in DDP themselves: a few lines over ``attach`` each, imported only when used."""
