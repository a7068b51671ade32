"""What only a CUDA device can show; `test_harness.py` runs the same paths on the CPU as far as they go."""
