"""Mechanisms that leave most activations of a token at zero."""
