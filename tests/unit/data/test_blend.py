from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecod_megatron.data import blend as module
from sparsecod_megatron.data.blend import BlendTable

WEIGHTS = st.lists(st.floats(0.01, 10), min_size=2, max_size=5)


@settings(max_examples=20)
@given(weights=WEIGHTS, num_samples=st.integers(0, 400), period=st.sampled_from([64, 100]))
def test_each_source_is_read_in_order_and_to_its_share(weights, num_samples, period):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "PERIOD", period)
        shares = np.array(weights) / sum(weights)
        if shares.min() < 1 / period:
            return
        table = BlendTable(weights)
        counts = table.counts(num_samples)
        places = [table.locate(index) for index in range(num_samples)]
    for source, share in enumerate(shares):
        numbers = [number for found, number in places if found == source]
        assert numbers == list(range(len(numbers)))
        assert counts[source] == len(numbers)
        assert abs(len(numbers) - share * num_samples) <= len(weights) * (1 + num_samples // period)
