"""Loops: the passes over memory in plain PyTorch, compiled for CPUs, and in Triton for CUDA."""
