"""Mechanisms that hold weights at zero, or make them of fewer numbers."""
