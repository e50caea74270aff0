"""What an engine takes beyond weights and KV cache, over a process that has only imported torch.

    python -m benchmarks.memory_overhead [--model FOLDER] [--kv-gib 1] [--scheme int8]

Resident memory of a worker of `benchmarks.compare` over all its tasks, the KV pool left out (it is
shared memory, of exactly the size asked for), less that of `python -c "import torch"`, less the
weights' bytes. The peak (VmHWM, with what of the pool is mapped) is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.compare.checkpoint import make_model, sizes
from benchmarks.compare.engines import GIB, Bench, Variant
from benchmarks.compare.memory import most_of, torch_alone_bytes
from benchmarks.compare.process import Worker
from benchmarks.compare.tasks import TASKS

MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(tempfile.gettempdir()) / "penstock-bench-0.6b"
    parser.add_argument("--model", type=Path, default=default)
    parser.add_argument("--kv-gib", type=int, default=1)
    parser.add_argument("--scheme", choices=("int8", "int4"), help="bf16 by default")
    options = parser.parse_args()
    model = make_model(options.model)
    variant = Variant("penstock", "penstock", options.scheme)
    num_threads = len(os.sched_getaffinity(0))
    pythons = {"penstock": Path(sys.executable)}
    bench = Bench(model, sizes(model), pythons, num_threads, options.kv_gib * GIB)
    worker = Worker(bench, variant)
    try:
        most = most_of(worker.hello, {})
        for repeat in range(2):
            for task in TASKS.values():
                job = task.job(repeat, bench.sizes.vocab_size)
                most = most_of(worker.run(job.prompts, job.max_tokens), most)
    finally:
        worker.close()
    alone_bytes, weight_bytes = torch_alone_bytes(), bench.weight_bytes(variant)
    result = {
        "peak_mib": most["peak_bytes"] / MIB,
        "torch_alone_mib": alone_bytes / MIB,
        "weights_mib": weight_bytes / MIB,
        "kv_pool_mib": bench.kv_bytes / MIB,
        "without_kv_mib": most["private_bytes"] / MIB,
        "overhead_mib": (most["private_bytes"] - alone_bytes - weight_bytes) / MIB,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
