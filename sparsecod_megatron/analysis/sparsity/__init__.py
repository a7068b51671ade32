"""Sparsity of a trained causal LM: its weights, attention rows, neurons and experts."""
