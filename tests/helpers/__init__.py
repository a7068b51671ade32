"""Shared by tests: small corpora, commands as a user runs them, reading of run directories."""
