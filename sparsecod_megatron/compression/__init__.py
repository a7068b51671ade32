"""Compression of trained models by NVIDIA ModelOpt: 2:4 sparsity and 8-bit post-training quantisation."""
