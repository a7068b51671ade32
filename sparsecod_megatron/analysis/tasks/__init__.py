"""Tasks with known answers, on which scores ask what a block does for the answer rather than for all text."""
