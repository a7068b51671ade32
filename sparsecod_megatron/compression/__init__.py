"""Compression of trained models: a file and a registry line a method, and what each did to every matrix."""
