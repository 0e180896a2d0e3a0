"""Engines: the sources of gradients. They handle names, streams and lifetimes, and contain no maths."""
