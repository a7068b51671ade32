"""Mechanisms of attention."""
