"""Mechanisms of mixtures of experts."""
