"""Pretraining on Megatron-Core that measures how well a deep language model uses its depth."""

__version__ = "0.1.0"
