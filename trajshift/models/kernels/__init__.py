"""Fused GPU kernels (Triton), each beside its plain PyTorch twin. Nothing here imports Triton before a kernel runs."""
