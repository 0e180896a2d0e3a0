"""Engines: where gradients come from. Names, streams and lifetimes, no maths."""
