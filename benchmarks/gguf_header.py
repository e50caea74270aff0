"""How long the head of a GGUF file takes: our reader against the `gguf` package's.

    python -m benchmarks.gguf_header [FILE] [--repeats N]

Without a file one is made whose vocabulary has 151,936 tokens and as many merges, as Qwen's has.
The two are alternated, each repeat in a process of its own; printed is the best of each, and how
much the process grew.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

TOKENS = 151_936
_READERS = {
    "penstock": "from penstock.gguf.header import read_header as read",
    "gguf package": "from gguf import GGUFReader as read",
}
_PROGRAM = """
import resource, time
from pathlib import Path
{imports}
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, start = peak(), time.perf_counter()
read(Path({path!r}))
print(time.perf_counter() - start, peak() - before)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.file or _make(Path(folder) / "vocabulary.gguf")
        best: dict[str, tuple[float, float]] = {}
        for _ in range(args.repeats):
            for name, imports in _READERS.items():
                program = _PROGRAM.format(imports=imports, path=str(path))
                out = subprocess.run(
                    [sys.executable, "-c", program], check=True, capture_output=True, text=True
                )
                seconds, grown_mib = (float(x) for x in out.stdout.split())
                best[name] = min(best.get(name, (seconds, grown_mib)), (seconds, grown_mib))
    for name, (seconds, grown_mib) in best.items():
        print(f"{name:14} {seconds:6.2f} s  {grown_mib:6.0f} MiB")


def _make(path: Path) -> Path:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "qwen3")
    tokens = [f"token{i}" for i in range(TOKENS)]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * TOKENS)
    writer.add_token_merges([f"{token} x" for token in tokens])
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


if __name__ == "__main__":
    main()
