"""Decoders of every block structure in transformers get their scores or one line.

`tools/sweep_decoders.py` does the same for all families that can be made tiny, in minutes.
"""

from __future__ import annotations

import pytest

from sparsecod_megatron.analysis.scores.registry import SCORES
from tests.helpers.decoders import outcomes

# `weights` is left out: its passes over ever sparser models take most of the time, and nothing else of a family. Sparse
# attention exchanges a model's attention as `attention` does, and refuses the same.
NAMES = tuple(name for name in SCORES if name not in ("weights", "sparse_attention", "seer_gate"))
NO_EXPERTS = {"experts": "no routed experts"}
NOT_EXCHANGEABLE = {"jacobian": "exchangeable", "attention": "attention"}
# One family for each structure of a block, and each way to fail; a score that is not named gives numbers.
REFUSED: dict[str, dict[str, str] | str] = {
    "mixtral": {},
    "gemma4_text": NO_EXPERTS,  # inputs of its own for each block
    "axk2": {"jacobian": "chosen tokens", "attention": "recomputed"},  # attends to chosen keys
    "glm_moe_dsa": {"jacobian": "chosen tokens", "attention": "recomputed"},  # blocks return a tuple
    "doge": NO_EXPERTS | {"jacobian": "chosen tokens"},  # an interface of attention functions of its own
    "longcat_flash": {"activation": "not a function of their own"},  # two attentions and three networks a block
    "jetmoe": {"activation": "not told", "experts": "not told"},  # mixtures of attention
    "llama4_text": {"activation": "not told", "experts": "not told"},
    "bloom": NO_EXPERTS | NOT_EXCHANGEABLE,
    "jamba": NOT_EXCHANGEABLE,
    "lfm2_moe": {"jacobian": "exchangeable"},  # convolutions
    "rwkv": NO_EXPERTS | NOT_EXCHANGEABLE,
    "xlstm": NO_EXPERTS | NOT_EXCHANGEABLE,
    "prophetnet": NO_EXPERTS | NOT_EXCHANGEABLE | {"activation": "rows for", "answers": "rows for"},  # several streams
    "bert": "changes with later tokens",
    "cpmant": "changes with later tokens",
    "xlnet": "changes with later tokens",
    "xmod": "Input language unknown",
    "gemma4_unified_assistant": "shared_kv_states",
    "openai-gpt": "no list of blocks",
}


@pytest.mark.parametrize("family", REFUSED)
def test_scores_are_numbers_or_one_line(family: str) -> None:
    found, expected = outcomes(family, NAMES), REFUSED[family]
    if isinstance(expected, str):
        assert isinstance(found, str) and expected in found and "\n" not in found
        return
    assert isinstance(found, dict), found
    assert {name for name, line in found.items() if line} == set(expected), found
    for name, part in expected.items():
        assert part in found[name] and "\n" not in found[name] and "--scores" in found[name]
