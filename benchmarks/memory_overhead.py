"""What an engine takes beyond weights and KV cache, over a process that has only imported torch.

    python -m benchmarks.memory_overhead [--model FOLDER] [--kv-bytes 1073741824]

Resident memory of a worker after each of the tasks, the KV pool left out (it is shared memory, of
exactly the size asked for), less that of `python -c "import torch"`, less the weights' bytes. The
peak (VmHWM, with what of the pool is mapped) is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.against_vllm import TASKS, Engine, make_model
from penstock.checkpoint import Checkpoint
from penstock.engine.loading.loader import weights_bytes
from penstock.engine.models.config import ModelConfig

BASE = "import torch; print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(tempfile.gettempdir()) / "penstock-bench-0.6b"
    parser.add_argument("--model", type=Path, default=default)
    parser.add_argument("--kv-bytes", type=int, default=1 << 30)
    options = parser.parse_args()
    model = make_model(options.model)
    said = subprocess.run([sys.executable, "-c", BASE], capture_output=True, text=True, check=True)
    base_bytes = int(said.stdout.split()[1]) * 1024
    engine = Engine("penstock", sys.executable, model, kv_bytes=options.kv_bytes)
    replies = [engine.run(task, seed) for seed in range(2) for task in TASKS]
    peak_bytes = max(reply["peak_bytes"] for reply in replies)
    private_bytes = max(reply["private_bytes"] for reply in replies)
    engine.close()
    weights = weights_bytes(ModelConfig.from_checkpoint(Checkpoint(model)), "bfloat16")
    result = {
        "peak_mib": peak_bytes / 2**20,
        "torch_alone_mib": base_bytes / 2**20,
        "weights_mib": weights / 2**20,
        "kv_pool_mib": options.kv_bytes / 2**20,
        "without_kv_mib": private_bytes / 2**20,
        "overhead_mib": (private_bytes - base_bytes - weights) / 2**20,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
