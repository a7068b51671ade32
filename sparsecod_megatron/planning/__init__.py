"""What a run will need and how long it may take, before any GPU is started: arithmetic on its configuration."""

from sparsecod_megatron.planning.hardware import GPUS
from sparsecod_megatron.planning.plan import make_plan, require_fit
from sparsecod_megatron.planning.search import search_layouts

__all__ = ["GPUS", "make_plan", "require_fit", "search_layouts"]
