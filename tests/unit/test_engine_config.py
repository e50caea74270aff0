"""What Python code may say of an engine: `EngineConfig`, and the keywords of `LLM`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.engine.config import QUANTIZATIONS, EngineConfig
from penstock.engine.quantization import select
from penstock.llm import LLM, engine_config
from penstock.protocol.errors import ConfigError


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"dtype": "int3"}, "dtype 'int3' is none of auto, bfloat16"),
        ({"device": "tpu"}, "device 'tpu' is none of"),
        ({"graph_mode": "full"}, "graph_mode 'full' is none of auto, eager"),
        ({"load_format": "pt"}, "load_format 'pt' is none of"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype 'fp8' is none of"),
        ({"kv_memory": 1}, "kv_memory 1 is none of auto, plain"),
        ({"quantization": "int5"}, "quantization 'int5' is none of"),
        ({"quantization": 8}, "quantization must be text, not 8"),
        ({"cpu_bind": 0}, "cpu_bind must be text, not 0"),
        ({"cpu_bind": "3-1"}, "--cpu-bind 3-1: give auto"),
        ({"trace": 5}, "trace must be text, not 5"),
        ({"kv_cache_memory_bytes": "1G"}, "kv_cache_bytes must be a whole number, not '1G'"),
        ({"max_model_len": 2.5}, "max_model_len must be a whole number"),
        ({"max_num_seqs": True}, "max_num_seqs must be a whole number, not True"),
        ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization must be a number"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching must be True or False"),
        ({"enforce_eager": "yes"}, "enforce_eager must be True or False"),
        ({"enforce_eager": True, "graph_mode": "piecewise"}, "does not go with 'piecewise'"),
        ({"num_blocks": 4, "num_gpu_blocks_override": 4}, "are the same: give one"),
        ({"max_modle_len": 64}, r"LLM has no argument 'max_modle_len' \(did you mean max_model_le"),
        ({"trust_remote_code": True}, "LLM has no argument 'trust_remote_code'.*never run"),
        ({"xyzzy": None}, "LLM has no argument 'xyzzy'$"),
    ],
)
def test_mistakes_are_config_errors_before_anything_is_loaded(
    keywords: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        LLM("/no/such/model", **keywords)


def test_vllms_names() -> None:
    found = engine_config(
        "toy",
        {"enforce_eager": True, "num_gpu_blocks_override": 9, "kv_cache_memory_bytes": 1 << 20},
    )
    assert found == EngineConfig("toy", graph_mode="eager", num_blocks=9, kv_cache_bytes=1 << 20)
    assert engine_config("toy", {"enforce_eager": False}) == EngineConfig("toy")
    for dtype in (torch.float16, "half", "float16"):
        assert engine_config("toy", {"dtype": dtype}).dtype == "float16"


def test_none_is_the_default_of_everything() -> None:
    names = set(EngineConfig.__dataclass_fields__) - {"model"} | {"kv_cache_memory_bytes"}
    assert engine_config("toy", dict.fromkeys(sorted(names))) == EngineConfig("toy")


def test_paths_may_be_paths() -> None:
    found = EngineConfig(Path("a"), trace=Path("b"))  # type: ignore[arg-type]
    assert (found.model, found.trace) == ("a", "b")


def test_the_quantizations_are_those_that_are_there() -> None:
    aliases = [name for name, method in select._ALIASES.items() if method in select.METHODS]
    assert set(QUANTIZATIONS) == {*select.METHODS, *aliases}
