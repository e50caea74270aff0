"""Who takes part: variants of engines, the Pythons they live in, and their forms of the weights."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.compare.checkpoint import Sizes
from benchmarks.compare.tasks import KV_TOKENS, MAX_MODEL_LEN

WORKERS = Path(__file__).with_name("workers")
GIB = 1 << 30


#: Behind a scheme of ours: the KV cache in int8 as well (OpenVINO's and llama.cpp's users do that).
INT8_KV = "+kv8"


@dataclass(frozen=True)
class Variant:
    name: str
    kind: str
    #: In the words of the engine: how the weights are held. None: bf16.
    scheme: str | None = None

    @property
    def bits(self) -> int:
        """Of a weight: engines are compared with those that read as much."""
        scheme = (self.scheme or "").removesuffix(INT8_KV)
        return {"int8": 8, "q8_0": 8, "int4": 4, "q4_0": 4}.get(scheme, 16)


VARIANTS = (
    Variant("penstock", "penstock"),
    Variant("vllm", "vllm"),
    Variant("openvino", "openvino"),
    Variant("llama", "llama"),
    Variant("transformers", "transformers"),
    Variant("penstock-int8", "penstock", "int8"),
    Variant("openvino-int8", "openvino", "int8"),
    Variant("llama-q8_0", "llama", "q8_0"),
    Variant("penstock-int8-kv8", "penstock", "int8" + INT8_KV),
    Variant("penstock-int4", "penstock", "int4"),
    Variant("llama-q4_0", "llama", "q4_0"),
)
#: What must be importable for an engine to be there.
MODULES = {"penstock": "penstock", "vllm": "vllm", "openvino": "openvino_genai",
           "llama": "llama_cpp", "transformers": "transformers"}  # fmt: skip
#: Beside weights and KV: libraries, compiled graphs, activations, copies of weights. As measured,
#: rounded up; it decides only who is resident together.
_EXTRA_GIB = {"penstock": 0.4, "vllm": 2.0, "openvino": 0.6, "llama": 0.5, "transformers": 0.6}


def choose(patterns: list[str]) -> list[Variant]:
    """Variants whose names match, in the table's order. Raises ValueError for a pattern in vain."""
    for pattern in patterns:
        if not any(fnmatch(variant.name, pattern) for variant in VARIANTS):
            names = ", ".join(variant.name for variant in VARIANTS)
            raise ValueError(f"no engine is called {pattern!r}: there are {names}")
    return [v for v in VARIANTS if any(fnmatch(v.name, pattern) for pattern in patterns)]


@dataclass(frozen=True)
class Bench:
    """One machine's arrangement for one checkpoint."""

    model: Path
    sizes: Sizes
    pythons: Mapping[str, Path]  # by kind
    num_threads: int
    kv_bytes: int
    eager: bool = False

    # --- what an engine reads ------------------------------------------------------------------

    def weights(self, variant: Variant) -> Path:
        """The checkpoint in the engine's own format, which lies beside it once made."""
        beside = self.model.parent / self.model.name
        if variant.kind == "openvino":
            return Path(f"{beside}-openvino-{variant.scheme or 'fp16'}")
        if variant.kind == "llama":
            return Path(f"{beside}-{variant.scheme or 'bf16'}.gguf")
        return self.model

    def weight_bytes(self, variant: Variant) -> int:
        """What a decode step reads of them, where the engine does not say so itself."""
        if variant.kind == "openvino":
            return (self.weights(variant) / "openvino_model.bin").stat().st_size
        if variant.kind == "llama":
            return self.weights(variant).stat().st_size
        if variant.scheme in ("int8", "int8" + INT8_KV):
            return self.sizes.int8_bytes
        if variant.scheme == "int4":
            return self.sizes.int4_bytes(128)
        return self.sizes.bf16_bytes

    def resident_bytes(self, variant: Variant) -> int:
        extra = int(_EXTRA_GIB[variant.kind] * GIB)
        return self.weight_bytes(variant) + self.kv_bytes + extra

    def prepare(self, variant: Variant, say: Callable[[str], None]) -> None:
        """Convert the checkpoint if it is not yet. Raises `CalledProcessError`."""
        out = self.weights(variant)
        if out.exists():
            return
        say(f"converting the checkpoint for {variant.name} (once)")
        partial = out.with_name("partial-" + out.name)
        if variant.kind == "openvino":
            tool = self.pythons["openvino"].with_name("optimum-cli")
            command = [tool, "export", "openvino", "-m", self.model]
            command += ["--task", "text-generation-with-past"]
            command += ["--weight-format", variant.scheme or "fp16", partial]
        else:
            source = self.model
            if variant.scheme:
                source = self.weights(Variant("llama", "llama"))
                self.prepare(Variant("llama", "llama"), say)
            command = [self.pythons["llama"], WORKERS / "hf_to_gguf.py", source, partial]
            command += [variant.scheme] if variant.scheme else []
        environment = _plain_environment() | {"HF_HUB_OFFLINE": "1"}
        words = [str(word) for word in command]
        subprocess.run(words, env=environment, check=True, capture_output=True)
        partial.rename(out)

    # --- how it is started ---------------------------------------------------------------------

    def settings(self, variant: Variant) -> dict[str, object]:
        return {
            "model": str(self.model),
            "weights": str(self.weights(variant)),
            "scheme": variant.scheme,
            "max_model_len": MAX_MODEL_LEN,
            "kv_bytes": self.kv_bytes,
            "kv_tokens": KV_TOKENS,
            "num_threads": self.num_threads,
            "eager": self.eager,
        }

    def server_command(self, variant: Variant, port: int) -> list[str] | None:
        """An OpenAI-compatible server on loopback; None where the engine has none that batches."""
        python = str(self.pythons[variant.kind])
        common = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
        common += ["--max-model-len", str(MAX_MODEL_LEN)]
        if variant.kind == "penstock":
            command = [python, "-m", "penstock.cli.main", "serve", str(self.model), *common]
            command += ["--kv-cache-memory-bytes", str(self.kv_bytes), "--no-banner"]
            if variant.scheme is None:
                return command
            command += ["--quantization", variant.scheme.removesuffix(INT8_KV)]
            return command + (["--kv-cache-dtype", "int8"] if INT8_KV in variant.scheme else [])
        if variant.kind == "vllm":
            command = [python, "-m", "vllm.entrypoints.openai.api_server"]
            command += ["--model", str(self.model), *common, "--disable-uvicorn-access-log"]
            return command + (["--enforce-eager"] if self.eager else [])
        return None

    def environment(self, kind: str) -> dict[str, str]:
        found = _plain_environment() | {"HF_HUB_OFFLINE": "1"}
        if kind == "vllm":
            # What its documentation advises for CPUs: cores bound, none held back, tcmalloc and
            # Intel's OpenMP preloaded.
            found |= {
                "VLLM_CPU_OMP_THREADS_BIND": cpu_range(self.num_threads),
                "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
                "VLLM_CPU_KVCACHE_SPACE": str(max(1, self.kv_bytes // GIB)),
            }
            if preload := self.preloads():
                found["LD_PRELOAD"] = ":".join(map(str, preload))
        elif kind in ("penstock", "transformers"):
            found["OMP_NUM_THREADS"] = str(self.num_threads)
        return found

    def preloads(self) -> list[Path]:
        """What can be found of tcmalloc and Intel's OpenMP, for vLLM."""
        places = [*Path("/usr/lib").glob("*-linux-gnu/libtcmalloc_minimal.so.4")]
        places += [*Path("/usr/lib64").glob("libtcmalloc_minimal.so.4")]
        return [*places[:1], *self.pythons["vllm"].parents[1].glob("lib/libiomp5.so")]


def _plain_environment() -> dict[str, str]:
    """Ours without what would leak our own modules into another venv."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}


def cpu_range(num_threads: int) -> str:
    """As vLLM reads it: 0-1 or 0,2."""
    cpus = sorted(os.sched_getaffinity(0))[:num_threads]
    if cpus == list(range(cpus[0], cpus[0] + len(cpus))):
        return f"{cpus[0]}-{cpus[-1]}"
    return ",".join(map(str, cpus))


def find_pythons(rivals: Path, said: Mapping[str, Path | None]) -> dict[str, Path]:
    """The Python of each engine that is there: `said` first, then a venv in `rivals`, and for
    transformers our own."""
    found = {"penstock": Path(sys.executable)}
    for kind in ("vllm", "openvino", "llama", "transformers"):
        candidates = [said.get(kind) or rivals / kind / "bin" / "python"]
        if kind == "transformers" and not said.get(kind):
            candidates.append(Path(sys.executable))
        for python in candidates:
            if python.exists() and has_module(python, MODULES[kind]):
                found[kind] = python
                break
    return found


def has_module(python: Path, module: str) -> bool:
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    command = [str(python), "-c", look]
    return subprocess.run(command, env=_plain_environment(), capture_output=True).returncode == 0


def in_waves(
    variants: list[Variant], needs: Mapping[str, int], available: int, pinned: str | None
) -> list[list[Variant]]:
    """Groups that fit in memory together, in order. Variants of as many bits stay together if they
    can; `pinned`, the one that all are compared with, is in each group. What does not fit at all
    gets a group of its own, and its chance."""
    always = [v for v in variants if v.name == pinned]
    whole_room = available - sum(needs[v.name] for v in always)
    waves: list[list[Variant]] = []
    room = 0

    def fits(some: list[Variant], space: int) -> bool:
        return sum(needs[v.name] for v in some) <= space

    others = [v for v in variants if v.name != pinned]
    for _, group in itertools.groupby(others, key=lambda v: v.bits):
        members = list(group)
        together = fits(members, room)
        if not together and fits(members, whole_room):
            waves.append(list(always))
            room, together = whole_room, True
        for variant in members:
            if not waves or not (together or fits([variant], room)):
                waves.append(list(always))
                room = whole_room
            waves[-1].append(variant)
            room -= needs[variant.name]
    return waves or ([always] if always else [])
