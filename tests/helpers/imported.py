"""What most commands import, imported: the server of tests/helpers/cli.py forks from here."""

from __future__ import annotations

import gc

from sparsecod_megatron.backend import select_backend

select_backend()

# After the backend, as everywhere.
import transformers.models.llama.modeling_llama  # noqa: E402, F401

import sparsecod_megatron.hf.verify  # noqa: E402, F401
import sparsecod_megatron.train  # noqa: E402, F401
from sparsecod_megatron.config import load_config  # noqa: E402
from sparsecod_megatron.config.versions import installed_versions  # noqa: E402

installed_versions()  # looked up once: half a second of every run
load_config(None)  # as are the defaults

# Each collection in a process forked from here would look at all of that again, and copy the pages it lies in.
gc.collect()
gc.freeze()
