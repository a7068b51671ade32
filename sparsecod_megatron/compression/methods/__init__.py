"""One file per compression method; `compression/registry.py` has a line for each."""
