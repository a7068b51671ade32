"""One compression method a file; `compression/registry.py` has a line for each."""
