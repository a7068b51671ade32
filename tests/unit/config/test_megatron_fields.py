"""Every field of Megatron-Core's configuration classes is in exactly one list of ours, and every answer names a way."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import load_config
from sparsecod_megatron.config.megatron_fields import (
    FIELDS_PASSED,
    KEYS_OF_FIELDS,
    MUON_FIELDS,
    READING_CONDITIONS,
    TRANSFORMER_ENGINE_FIELDS,
)
from sparsecod_megatron.config.megatron_refused import REFUSALS
from sparsecod_megatron.config.schema import RunConfig
from sparsecod_megatron.config.typed import known_keys
from sparsecod_megatron.errors import ConfigError
from tests.helpers.cli import sparsecod

select_backend()

import megatron.core  # noqa: E402
from megatron.core.distributed import DistributedDataParallelConfig  # noqa: E402
from megatron.core.model_parallel_config import ModelParallelConfig  # noqa: E402
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig  # noqa: E402

CLASSES = (
    ModelParallelConfig,
    TransformerConfig,
    MLATransformerConfig,
    OptimizerConfig,
    DistributedDataParallelConfig,
)
READERS = (
    "extensions/transformer_engine.py",
    "fp8_utils.py",
    "models/common/language_module/language_module.py",
    "optimizer/muon.py",
    "pipeline_parallel/p2p_communication.py",
    "transformer/attention.py",
    "transformer/mlp.py",
    "transformer/moe/experts.py",
    "transformer/moe/router.py",
    "transformer/moe/token_dispatcher.py",
    "transformer/transformer_block.py",
)
"""Files of Megatron-Core that run with Transformer Engine, or under Muon."""
EXPERTS = ("model.num_moe_experts=4",)
PP2 = "parallel.pipeline_model_parallel_size=2"


def answer(*overrides: str) -> str:
    """The one line that refuses it."""
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_upstream_field_is_listed_once() -> None:
    upstream = sorted({item.name for cls in CLASSES for item in dataclasses.fields(cls)})
    listed = sorted([*FIELDS_PASSED, *KEYS_OF_FIELDS, *(field for fields in REFUSALS.values() for field in fields)])
    assert listed == upstream
    assert FIELDS_PASSED.keys() >= TRANSFORMER_ENGINE_FIELDS
    assert FIELDS_PASSED.keys() >= READING_CONDITIONS.keys() | {other for other, _ in READING_CONDITIONS.values()}


def test_keys_that_answers_name_exist() -> None:
    ours = {*known_keys(RunConfig), *(f"megatron.{field}" for field in FIELDS_PASSED)}
    assert set(KEYS_OF_FIELDS.values()) <= ours


def test_fields_that_no_cpu_reads_are_read_by_what_runs_elsewhere() -> None:
    """What a CPU reads is shown by `tests/dist/test_megatron_fields.py`, which trains with it."""
    folder = Path(megatron.core.__path__[0])
    trees = [ast.parse((folder / name).read_text()) for name in READERS]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    # moe_grouped_gemm is ours to read: it chooses the experts' module.
    assert read >= (TRANSFORMER_ENGINE_FIELDS | MUON_FIELDS.keys() | {"batch_p2p_sync"}) - {"moe_grouped_gemm"}


@pytest.mark.parametrize("field", [*KEYS_OF_FIELDS, *(field for fields in REFUSALS.values() for field in fields)])
def test_fields_that_do_not_pass_are_refused(field: str) -> None:
    """Whatever the value, and with the key to set where there is one."""
    said = answer(f"megatron.{field}=1")
    assert said.startswith(f"megatron.{field}: 1, but ")
    assert KEYS_OF_FIELDS[field] in said if field in KEYS_OF_FIELDS else said.endswith("; remove it")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("megatron.nonsense=3",), ("megatron.nonsense: 3: no such", "docs/PARALLELISM.md")),
        (("megatron.recompute_granularit=full",), ("did you mean 'recompute_granularity'?",)),
        (("megatron.bucket_size=many",), ("bucket_size: 'many' is not a whole number",)),
        (("megatron.bucket_size=true",), ("bucket_size: true is not a whole number",)),
        (("megatron.attention_backend=local",), ("'local' is not one of flash, fused",)),
        (("megatron.overlap_grad_reduce=1",), ("1 is not true or false",)),
        (("megatron.moe_permute_fusion=true",), ("no experts",)),
        (("megatron.moe_permute_fusion=true", *EXPERTS, "backend=cpu"), ("only Transformer Engine reads it",)),
        (("megatron.moe_token_dispatcher_type=flex", *EXPERTS), ("raise parallel.expert_model_parallel_size",)),
        (("megatron.moe_deepep_num_sms=8", *EXPERTS), ("only megatron.moe_token_dispatcher_type='flex' reads it",)),
        (("megatron.moe_token_drop_policy=position", *EXPERTS), ("model.moe_expert_capacity_factor is not set",)),
        (("megatron.fp8_margin=1",), ("precision.fp8_recipe is none",)),
        (("megatron.muon_split_qkv=false",), ("is not muon",)),
        (("megatron.cross_entropy_loss_fusion=true", "precision.dtype=fp32"), ("rounds its gradient to bf16",)),
        (("megatron.glu_linear_offset=1", "model.activation=relu"), ("model.activation=relu has no gate",)),
        (("megatron.bias_activation_fusion=true", "model.activation=geglu"), ("set it to false",)),
        (("megatron.recompute_granularity=full",), ("megatron.recompute_method is not set",)),
        (("megatron.recompute_modules=[mlp]",), ("only megatron.recompute_granularity='selective' reads it",)),
        (
            ("megatron.recompute_granularity=selective", "megatron.recompute_modules=[nonsense]"),
            ("it takes a list of core_attn",),
        ),
        (("megatron.account_for_loss_in_pipeline_split=true",), ("there is one pipeline stage",)),
        ((PP2, "megatron.pipeline_model_parallel_layout='Et*6|t*5L'"), ("it has 11 layers (t)", "num_layers=12")),
        ((PP2, "megatron.pipeline_model_parallel_layout='E(tt|)*6L'"), ("it has 7 parts", "is 2")),
    ],
)
def test_fields_that_pass_are_refused_where_they_mean_nothing(
    overrides: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    said = answer(*overrides)
    for part in parts:
        assert part in said


def test_deepep_passes_where_it_can_run() -> None:
    flex = ("megatron.moe_token_dispatcher_type=flex", "megatron.moe_deepep_num_sms=8")
    config = load_config(None, [*EXPERTS, *flex, "parallel.expert_model_parallel_size=2"])
    from sparsecod_megatron.model import transformer_config

    with pytest.raises(ConfigError, match="needs DeepEP; install deep_ep"):
        transformer_config(config, transformer_engine=True)
    assert "DeepEP runs on CUDA" in answer(*EXPERTS, *flex, "parallel.expert_model_parallel_size=2", "backend=cpu")


def test_docs_list_what_passes(repo_root: Path) -> None:
    page = (repo_root / "docs" / "PARALLELISM.md").read_text()
    section = page.partition("## Fields under `megatron:`\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    assert sorted(field for row in rows[1:] for field in re.findall(r"`(\w+)`", row.split(" | ")[-1])) == sorted(
        FIELDS_PASSED
    )


def test_training_planning_and_studies_answer_alike(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text("{name: a, question: b, base: run.yaml, run: {megatron.qk_l2_norm: true}, seeds: [1]}\n")
    (tmp_path / "run.yaml").write_text("model: {preset: nano-dense}\n")
    wrong, output = "megatron.qk_l2_norm=true", tmp_path / "out"
    commands = (
        ("train", tmp_path / "run.yaml", wrong, f"logging.run_dir={output}", "--nproc", "2"),
        ("plan", tmp_path / "run.yaml", wrong, "--gpus", "1"),
        ("study", study, "--output", output, "--dry-run"),
        ("study", study, "--output", output, "--submit", "slurm"),
    )
    for command in commands:
        result = sparsecod(*command, check=False)
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert "megatron.qk_l2_norm: true, but it changes the architecture" in line
    assert not output.exists()


CP2 = "parallel.context_parallel_size=2"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("megatron.cp_comm_type=all_gather",), "there is one context-parallel rank"),
        ((CP2, "model.sliding_window=8", "megatron.cp_comm_type=p2p"), "a ring has no sliding window"),
        ((CP2, "megatron.cp_comm_type=a2a", "model.num_query_groups=1"), "it deals 1 query groups"),
        ((CP2, "model.softmax_type=learnable", "megatron.cp_comm_type=p2p"), "needs whole heads on each rank"),
    ],
)
def test_exchanges_of_keys_that_would_fail(overrides: tuple[str, ...], expected: str) -> None:
    line = answer("backend=cuda", *overrides)
    assert line.startswith("megatron.cp_comm_type: ")
    assert expected in line


SINKS = "model.softmax_type=learnable"


@pytest.mark.parametrize(
    ("window", "expected"),
    [((), None), (("model.sliding_window=8",), "all_gather"), (("model.sliding_window=8", SINKS), "a2a")],
)
def test_a_window_gathers_its_keys(window: tuple[str, ...], expected: str | None) -> None:
    """What Transformer Engine's own choice, a ring, would refuse in the first forward pass; sinks need whole heads."""
    from sparsecod_megatron.model import transformer_config

    run = load_config(None, ["model.vocab_size=64", CP2, *window])
    assert transformer_config(run, transformer_engine=True).cp_comm_type == expected


def test_fused_weight_gradients_without_their_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line instead of Megatron-Core's traceback; by default they are off for its own layers where it is missing."""
    from megatron.core.tensor_parallel import layers

    from sparsecod_megatron.model import transformer_config

    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    run = load_config(None, ["model.vocab_size=64"])
    assert not transformer_config(run, transformer_engine=True).gradient_accumulation_fusion
    asked = load_config(None, ["model.vocab_size=64", "megatron.gradient_accumulation_fusion=true"])
    with pytest.raises(ConfigError, match="megatron.gradient_accumulation_fusion: true, but .* install apex"):
        transformer_config(asked, transformer_engine=True)


VPP2 = (PP2, "parallel.virtual_pipeline_model_parallel_size=2", "model.num_layers=4")
BATCHED, OVERLAPPED = (False, True), (True, False)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((PP2,), BATCHED),
        (VPP2, OVERLAPPED),
        ((*VPP2, "megatron.batch_p2p_comm=true"), BATCHED),
        ((*VPP2, "megatron.overlap_p2p_comm=false"), BATCHED),
        ((PP2, "megatron.overlap_p2p_comm=true"), OVERLAPPED),
    ],
)
def test_stages_exchange_as_nccl_can(
    overrides: tuple[str, ...], expected: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron-LM's choices, and never both of them; gloo has neither."""
    from sparsecod_megatron.model import transformer_config

    run = load_config(None, ["model.vocab_size=64", *overrides])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = transformer_config(run, transformer_engine=True)
    assert (made.overlap_p2p_comm, made.batch_p2p_comm) == expected


def test_stages_exchange_one_by_one_on_gloo() -> None:
    from sparsecod_megatron.model import transformer_config

    made = transformer_config(load_config(None, ["model.vocab_size=64", *VPP2]), transformer_engine=False)
    assert (made.overlap_p2p_comm, made.batch_p2p_comm, made.deallocate_pipeline_outputs) == (False, False, True)
    assert "set one of them to false" in answer("megatron.batch_p2p_comm=true", "megatron.overlap_p2p_comm=true")
