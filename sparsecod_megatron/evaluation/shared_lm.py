"""lm-eval's HuggingFace model, its requests dealt out to processes so that any number of them gives the same numbers.

lm-eval's own splitting (accelerate) deals out documents: every rank then forms other batches, and results are gathered
in another order, so that log-likelihoods differ in their last digits and resampled errors altogether. Here whole
batches are dealt out, those that one process forms, and every rank hands lm-eval all answers in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsecod_megatron.parallel.processes import Processes

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]
"""Texts of context and continuation, and the tokens of each."""


class SharedLM(HFLM):
    """A loaded model that scores its share of all batches.

    Args:
        model: a causal LM on its device; its `max_position_embeddings` bounds the prompt.
        tokenizer: the model's.
        batch_size: requests of a forward pass.
        processes: what shares the work.
        progress: show a bar.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        processes: Processes,
        progress: bool,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._processes, self._hidden = processes, not progress
        self.num_truncated = 0
        """Requests whose context lost its beginning, for lack of room."""

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives it) of each continuation. Collective over the processes."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or self._hidden)

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if override_bs is not None:  # windows of whole documents, which are dealt out already
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        self.num_truncated += sum(len(context) + len(rest) > self.max_length + 1 for _, context, rest in requests)

        def work(batches: Sequence[list[int]]) -> list[list[tuple[float, bool]]]:
            own = [requests[index] for index in chain.from_iterable(batches)]
            answers = iter(super(SharedLM, self)._loglikelihood_tokens(own, disable_tqdm=disable_tqdm))
            return [[next(answers) for _ in batch] for batch in batches]

        batches = batch_indices(requests, self.batch_size)
        answers = self._processes.distribute(batches, work)
        return _in_place(batches, answers, len(requests))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each document. Collective over the processes."""
        blocks = _blocks(list(range(len(requests))), self.batch_size)

        def work(own: Sequence[list[int]]) -> list[list[float]]:
            return [
                super(SharedLM, self).loglikelihood_rolling([requests[index] for index in block], disable_tqdm=True)
                for block in own
            ]

        answers = self._processes.distribute(blocks, work)
        return _in_place(blocks, answers, len(requests))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuation of each context. Collective over the processes."""
        longest_first = sorted(range(len(requests)), key=lambda index: -len(requests[index].args[0]))
        blocks = _blocks(longest_first, self.batch_size)

        def work(own: Sequence[list[int]]) -> list[list[str]]:
            return [
                super(SharedLM, self).generate_until([requests[index] for index in block], disable_tqdm=True)
                for block in own
            ]

        answers = self._processes.distribute(blocks, work)
        return _in_place(blocks, answers, len(requests))


def batch_indices(requests: Sequence[TokenRequest], batch_size: int) -> list[list[int]]:
    """Which requests one process answers in each forward pass, in its order.

    Requests that differ in their last token only share a row; rows are ordered by length and tokens.

    Source: lm-eval 0.4.13, models/huggingface.py `_loglikelihood_tokens` and models/utils.py `Collator`.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for index, (_, context, continuation) in enumerate(requests):
        rows.setdefault((*context, *continuation[:-1]), []).append(index)

    def order(members: list[int]) -> tuple[int, list[int]]:
        _, context, continuation = requests[max(members, key=lambda index: len(requests[index][2]))]
        return -len(context) - len(continuation), context + continuation

    ordered = sorted(rows.values(), key=order)
    return [list(chain.from_iterable(block)) for block in _blocks(ordered, batch_size)]


def _blocks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _in_place(blocks: Sequence[list[int]], answers: Sequence[list[Any]], count: int) -> list[Any]:
    """Answers, which come block by block, each where its index says."""
    placed: list[Any] = [None] * count
    for index, answer in zip(chain.from_iterable(blocks), chain.from_iterable(answers), strict=True):
        placed[index] = answer
    return placed
