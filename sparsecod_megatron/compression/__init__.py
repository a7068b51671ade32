"""Compression of trained models: one file and one registry line per method, and what each did to every matrix."""
