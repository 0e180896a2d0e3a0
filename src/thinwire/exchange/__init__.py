"""The exchange of gradients over the network: read ``pipeline.py`` first."""
