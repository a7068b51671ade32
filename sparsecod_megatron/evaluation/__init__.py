"""Quality of a HuggingFace model directory: perplexity on held-out text, and lm-eval tasks."""
