"""What most commands import, imported: the server of tests/helpers/cli.py forks from here."""

from __future__ import annotations

from sparsecod_megatron.backend import select_backend

select_backend()

import sparsecod_megatron.train  # noqa: E402, F401 - after the backend, as everywhere
