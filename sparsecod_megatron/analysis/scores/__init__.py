"""Scores of a trained model, each one file behind one protocol, found by name in the registry."""
