"""The journey of a gradient: read ``pipeline.py`` first."""
