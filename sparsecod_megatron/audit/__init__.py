"""Proof that a configuration trains the same model under every layout: its architecture made small, stepped in each."""
