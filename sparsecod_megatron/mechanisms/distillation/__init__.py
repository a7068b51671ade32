"""Training towards what another model, the teacher, computes on the same tokens."""
