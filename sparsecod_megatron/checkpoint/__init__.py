"""Checkpoints that any layout writes and any layout reads, through Megatron-Core's dist_checkpointing.

`saver` writes them, `native` loads them, `state` is what they hold besides tensors, `paths` finds them; `paths`
and `decay_curves` alone can be imported without Megatron-Core.
"""
