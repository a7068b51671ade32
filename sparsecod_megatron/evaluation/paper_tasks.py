"""The downstream tasks that the paper's models are compared on, by their names in lm-eval."""

from __future__ import annotations

PAPER = "paper"
"""Stands for them in a list of tasks."""
PAPER_TASKS = (
    "mmlu",
    "hellaswag",
    "arc_easy",
    "arc_challenge",
    "piqa",
    "winogrande",
    "boolq",
    "openbookqa",
    "sciq",
)
