"""The commands as processes, with the carried model: what a newcomer types in the first minutes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from penstock.checkpoint import TOY

ROOT = Path(__file__).parents[2]
PENSTOCK = [sys.executable, "-m", "penstock.cli.main"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
#: Small, so that several fit beside each other.
SMALL = ["--max-num-seqs", "4", "--max-model-len", "512"]


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PENSTOCK, *arguments], env=ENVIRONMENT, input=stdin, capture_output=True, text=True,
        timeout=100,
    )  # fmt: skip


class Served:
    """`penstock serve toy`, started; `banner` is what it printed once ready."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*PENSTOCK, "serve", "toy", "--port", "0", *SMALL, *arguments],
            env=ENVIRONMENT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        lines: list[str] = []
        for line in self.process.stdout:
            lines.append(line)
            if line.startswith("PORT="):  # its last line
                break
        self.banner = "".join(lines)
        found = re.search(r"http://127\.0\.0\.1:\d+", self.banner)
        assert found is not None, self.banner
        self.url = found[0]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.stop()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.kill()


def test_ready_means_ready(served: Served) -> None:
    """The banner comes after the first real token, so nothing has to be waited for."""
    assert httpx.get(f"{served.url}/health").status_code == 200


def test_the_curl_line_of_the_banner(served: Served) -> None:
    line = next(line for line in served.banner.splitlines() if line.startswith("curl "))
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    answer = json.loads(done.stdout)
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "toy"
    assert answer["usage"]["completion_tokens"] > 0


def test_the_python_lines_of_the_banner(served: Served) -> None:
    lines = served.banner.splitlines()
    start = lines.index("from openai import OpenAI")
    snippet = "\n".join(lines[start : lines.index("", start)])
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr.decode()


def test_chat_with_the_server(served: Served) -> None:
    done = run("chat", "--url", served.url, "--max-tokens", "8", stdin="Hello!\nAgain\n")
    assert done.returncode == 0, done.stderr


def test_bench_against_the_server(served: Served) -> None:
    done = run(
        "bench", "--url", served.url, "--num-prompts", "4", "--max-concurrency", "2",
        "--random-input-len", "16", "--random-output-len", "5", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["output_tokens"] == 20


def test_a_second_server_on_the_same_port(served: Served) -> None:
    port = served.url.rpartition(":")[2]
    done = run("serve", "toy", "--port", port)
    assert done.returncode == 2
    assert f"port {port} is taken by" in done.stderr
    assert f"(pid {served.process.pid})" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_private_chat_leaves_nothing_behind(tmp_path: Path) -> None:
    environment = ENVIRONMENT | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [*PENSTOCK, "chat", "toy", *SMALL, "--max-tokens", "4"],
        env=environment, input="Hello!\n", capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["--in-process"]], ids=["two processes", "one"])
def test_sigterm_stops_everything(arguments: list[str]) -> None:
    served = Served(*arguments)
    try:
        children = _children(served.process.pid)
        assert len(children) == (0 if arguments else 1)
        assert served.stop() == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    finally:
        served.kill()


def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("sesame\n")
    served = Served("--api-key-file", str(file))
    try:
        assert "sesame" not in served.banner
        models = f"{served.url}/v1/models"
        assert httpx.get(models).status_code == 401
        assert httpx.get(models, headers={"Authorization": "Bearer sesame"}).status_code == 200
    finally:
        served.kill()


def _truncated(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1_000_000)


def _foreign(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["T5Model"]}))


def _untexted(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "flags", "word"),
    [
        (_truncated, [], "truncated"),
        (_foreign, [], "T5Model"),
        (_untexted, [], "tokenizer.json"),
        (lambda _: None, ["--kv-cache-memory-bytes", "1K"], "KV cache"),
        (lambda _: None, ["--max-model-len", "1m"], "max_model_len"),
    ],
    ids=["truncated", "another family", "no tokenizer", "too small a cache", "too long"],
)
def test_what_cannot_be_served_ends_with_a_reason_and_no_traceback(
    tmp_path: Path, damage: object, flags: list[str], word: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TOY, folder)
    damage(folder)  # type: ignore[operator]
    done = run("serve", str(folder), "--port", "0", *flags)
    assert done.returncode not in (0, None)
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]
