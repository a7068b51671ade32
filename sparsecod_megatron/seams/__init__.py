"""Contracts between the parts of a run: what a mechanism may say and do, and the one table of a model's tensors.

Arithmetic and protocols only, neither torch nor Megatron-Core, so that whoever plans or checks a run can read them.
"""
