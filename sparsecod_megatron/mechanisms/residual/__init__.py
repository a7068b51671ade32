"""Mechanisms that change the residual path: what a branch reads, and how it is joined."""
