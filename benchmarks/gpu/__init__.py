"""The tests and benchmarks that need CUDA, in one run; ``__main__.py`` says how."""
