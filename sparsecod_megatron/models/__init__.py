"""Trained models as the rest uses them, from wherever they lie."""
