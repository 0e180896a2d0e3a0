"""Kernels: passes over memory in plain PyTorch, in numba for CPUs and in Triton for CUDA."""
