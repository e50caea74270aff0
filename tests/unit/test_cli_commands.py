"""`chat`, `bench`, `doctor` and the banner, against a server of a few lines and broken folders."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from penstock.checkpoint import TOY, Checkpoint
from penstock.cli.banner import CHAT_PROMPTS, Banner, command
from penstock.cli.bench import Outcome, summary
from penstock.cli.main import main
from penstock.cli.serve import config_of, make_parser

ROOT = Path(__file__).parents[2]


class FakeServer(ThreadingHTTPServer):
    """Speaks enough of OpenAI's API; echoes the last message word by word."""

    daemon_threads = True

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any], str | None]] = []
        self.fail_with: tuple[int, str] | None = None
        self.delay_s = 0.0
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave early are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        self._json({"data": [{"id": "fake"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append((self.path, body, self.headers.get("authorization")))
        if self.path == "/tokenize":
            self._json({"count": 2 * len(body["prompt"].split())})
        elif self.server.fail_with is not None:
            status, message = self.server.fail_with
            self._json({"error": {"message": message}}, status)
        elif body.get("stream"):
            self._stream(body)
        else:
            self._json({"choices": [{"message": {"content": "twelve"}}]})

    def _stream(self, body: dict[str, Any]) -> None:
        chat = "messages" in body
        text = body["messages"][-1]["content"] if chat else body["prompt"]
        if isinstance(text, list):
            text = " ".join(str(token) for token in text)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        words = text.split()[: body.get("max_tokens", 10**9)]
        for word in words:
            piece = {"delta": {"content": f"{word} "}} if chat else {"text": f"{word} "}
            self._event({"choices": [{"index": 0, **piece}]})
            time.sleep(self.server.delay_s)
        usage = {"prompt_tokens": 2 * len(text.split()), "completion_tokens": len(words)}
        if body.get("stream_options", {}).get("include_usage"):
            self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def _json(self, body: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


Says = Callable[..., tuple[int, str, str]]


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Says:
    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


# chat ---------------------------------------------------------------------------------------------


def test_a_piped_conversation_is_answers_only(server: FakeServer, says: Says) -> None:
    code, out, err = says("chat", "--url", server.url, stdin="one two\n\nthree\n")
    assert (code, out, err) == (0, "one two \nthree \n", "")
    roles = [[m["role"] for m in body["messages"]] for _, body, _ in server.requests]
    assert roles == [["user"], ["user", "assistant", "user"]]
    assert server.requests[1][1]["messages"][1]["content"] == "one two "


def test_reset_and_system(server: FakeServer, says: Says) -> None:
    says("chat", "--url", server.url + "/v1/", "--system", "be brief", "--temperature", "0.5",
         "--max-tokens", "7", "--seed", "3",
         stdin="a\n/reset\nb\n/system be long\nc\n/nonsense\n/exit\nnever\n")  # fmt: skip
    conversations = [[m["content"] for m in body["messages"]] for _, body, _ in server.requests]
    assert conversations == [["be brief", "a"], ["be brief", "b"], ["be long", "c"]]
    body = server.requests[0][1]
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0.5, 7, 3)
    assert body["model"] == "fake"


def test_the_key_is_sent(server: FakeServer, says: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_API_KEY", "from-environment")
    says("chat", "--url", server.url, stdin="a\n")
    says("chat", "--url", server.url, "--api-key", "given", stdin="a\n")
    keys = [key for _, _, key in server.requests]
    assert keys == ["Bearer from-environment", "Bearer given"]


def test_an_error_does_not_end_the_conversation(server: FakeServer, says: Says) -> None:
    server.fail_with = (400, "this prompt is too long")
    code, out, _ = says("chat", "--url", server.url, stdin="a\nb\n")
    assert code == 0
    assert out.count("this prompt is too long") == 2
    assert [len(body["messages"]) for _, body, _ in server.requests] == [1, 1]


@pytest.mark.parametrize("command", ["chat", "bench"])
def test_no_server_there(says: Says, command: str) -> None:
    code, _, err = says(command, "--url", "http://127.0.0.1:9", stdin="a\n")
    assert code == 1
    assert "no server answers at http://127.0.0.1:9" in err
    assert err.count("\n") == 1


def test_ctrl_c_stops_the_answer_and_not_the_chat(server: FakeServer) -> None:
    server.delay_s = 0.02
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "penstock.cli.main", "chat", "--url", server.url],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"word " * 3000 + b"\n")
    process.stdin.flush()
    assert process.stdout.read(4) == b"word"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(b"short\n", timeout=60)
    assert process.returncode == 0, err.decode()
    assert out.endswith(b"short \n")
    assert len(out) < 3000 * 5
    assert b"Traceback" not in err


# bench --------------------------------------------------------------------------------------------


def test_bench_counts_what_it_sent(server: FakeServer, says: Says) -> None:
    code, out, _ = says(
        "bench", "--url", server.url, "--num-prompts", "9", "--max-concurrency", "3",
        "--random-input-len", "40", "--random-output-len", "5", "--json",
    )  # fmt: skip
    result = json.loads(out)
    assert code == 0
    assert (result["completed"], result["failed"]) == (9, 0)
    # Two tokens a word, says this server's tokenizer, so prompts have half as many words.
    assert result["input_tokens"] == 9 * 40
    assert result["output_tokens"] == 9 * 5
    assert set(result["ttft_ms"]) == {"mean", "p50", "p90", "p99"}
    bodies = [body for path, body, _ in server.requests if path == "/v1/completions"]
    assert all(body["ignore_eos"] and body["max_tokens"] == 5 for body in bodies)
    assert len({body["prompt"] for body in bodies}) > 1


def test_bench_is_repeatable(server: FakeServer, says: Says) -> None:
    for _ in range(2):
        assert says("bench", "--url", server.url, "--num-prompts", "4", "--seed", "7")[0] == 0
    prompts = [body["prompt"] for path, body, _ in server.requests if path == "/v1/completions"]
    assert sorted(prompts[:4]) == sorted(prompts[4:])


def test_bench_reports_failures(server: FakeServer, says: Says) -> None:
    server.fail_with = (429, "the queue is full")
    code, out, _ = says("bench", "--url", server.url, "--num-prompts", "3")
    assert code == 1
    assert "the queue is full" in out
    assert "0 requests" in out


def test_bench_plays_a_trace(server: FakeServer, says: Says, tmp_path: Path) -> None:
    lines = [(0.0, 600, 5, [7]), (0.1, 700, 3, [7, 8]), (0.2, 40, 2, [])]
    rows = [
        json.dumps(dict(arrival_s=at_s, input_tokens=n, output_tokens=out, hash_ids=ids))
        for at_s, n, out, ids in lines
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    code, out, _ = says(
        "bench", "--url", server.url, "--trace", str(tmp_path / "t.jsonl"), "--speed", "2",
        "--goodput", "ttft:60000", "tpot:60000", "--metric-percentiles", "95", "--json",
    )  # fmt: skip
    result = json.loads(out)
    assert code == 0 and result["completed"] == 3 and result["duration_s"] >= 0.1
    assert result["output_tokens"] == 10 and result["slo_attainment"] == 1.0
    assert set(result["itl_ms"]) == {"mean", "p95"}
    bodies = [body for path, body, _ in server.requests if path == "/v1/completions"]
    prompts = sorted((body["prompt"] for body in bodies), key=len)
    assert [len(prompt) for prompt in prompts] == [40, 600, 700]
    assert prompts[1][:512] == prompts[2][:512]
    assert sorted(body["max_tokens"] for body in bodies) == [2, 3, 5]
    code, out, _ = says(
        "bench", "--url", server.url, "--trace", str(tmp_path / "t.jsonl"), "--limit", "2",
        "--goodput", "ttft:0.0001", "--request-rate", "50",
    )  # fmt: skip
    assert code == 0 and "within TTFT 0.0001 ms: 0.0%" in out


def test_bench_takes_lengths_at_a_rate(server: FakeServer, says: Says, tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("input_tokens,output_tokens\n9,2\n17,1\n")
    trace = ("bench", "--url", server.url, "--trace", str(tmp_path / "l.csv"))
    code, out, _ = says(*trace, "--request-rate", "100", "--burstiness", "0.5", "--json")
    assert code == 0 and json.loads(out)["output_tokens"] == 3
    code, _, err = says(*trace)
    assert code == 2 and "no times of arrival" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speed", "2"], "give one with --trace"),
        (["--trace", "x.csv", "--speed", "0"], "--speed: '0' is no number above 0"),
        (["--trace", "x.csv", "--random-input-len", "5"], "has its own lengths"),
        (["--trace", "x.csv"], "cannot be read"),
        (["--trace", "generate:rate=1"], "needs a duration"),
        (["--trace", "x.csv", "--speed", "2", "--request-rate", "1"], "choose one"),
        (["--burstiness", "2"], "give one"),
        (["--goodput", "ttft=500"], "is not like ttft:500"),
        (["--request-rate", "0"], "no rate above 0"),
        (["--metric-percentiles", "101"], "not like 50,90,99"),
    ],
)
def test_bench_says_what_does_not_fit(
    server: FakeServer, says: Says, arguments: list[str], message: str
) -> None:
    code, out, err = says("bench", "--url", server.url, *arguments)
    assert code == 2 and message in err and not out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("as_json", [True, False])
def test_an_interrupted_bench_says_what_it_has(
    server: FakeServer, says: Says, number: signal.Signals, code: int, as_json: bool
) -> None:
    server.delay_s = 0.01

    def strike() -> None:
        while sum(path == "/v1/completions" for path, _, _ in server.requests) < 4:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    flags = ["--num-prompts", "5000", "--max-concurrency", "1", "--random-output-len", "2"]
    # Whoever runs the tests in the background has SIGINT ignored, which is left so.
    before = signal.signal(number, signal.default_int_handler)
    try:
        threading.Thread(target=strike, daemon=True).start()
        found, out, err = says("bench", "--url", server.url, *flags, *["--json"] * as_json)
    finally:
        signal.signal(number, before)
    assert found == code and not err
    if not as_json:
        assert f"interrupted ({number.name}): " in out and "more were not sent" in out
        return
    result = json.loads(out)
    assert result["interrupted_by"] == number.name and result["failed"] == 0
    assert result["completed"] >= 3 and result["completed"] + result["given_up"] == 5000
    assert result["output_tokens"] == 2 * result["completed"] and result["tpot_ms"]


def test_the_summary() -> None:
    outcomes = [
        Outcome("", ttft_s=i / 10, end_s=i / 10 + 0.9, prompt_tokens=5, output_tokens=10)
        for i in range(1, 101)
    ]
    outcomes += [Outcome("broken"), Outcome("", 0.05, 0.05, 5, 1)]
    result = summary(outcomes, duration_s=10.0)
    assert (result["completed"], result["failed"], result["errors"]) == (101, 1, ["broken"])
    assert result["output_throughput_tokens_per_s"] == pytest.approx(100.1)
    # One token has no time per token after it.
    assert result["tpot_ms"]["mean"] == pytest.approx(100.0)
    assert result["ttft_ms"]["p50"] == pytest.approx(5000.0)
    assert result["ttft_ms"]["p99"] == pytest.approx(9900.0)


# doctor -------------------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    folder = tmp_path / "toy"
    shutil.copytree(TOY, folder)
    return folder


def doctor(says: Says, *arguments: str) -> tuple[int, dict[str, Any], list[str]]:
    code, out, _ = says("doctor", *arguments, "--port", "0", "--json")
    report = json.loads(out)
    errors = [f["text"] for f in report["findings"] if f["level"] == "error"]
    assert report["can_serve"] == (code == 0) == (not errors)
    return code, report, errors


def test_a_healthy_patient(says: Says) -> None:
    code, report, _ = doctor(says, "toy")
    assert code == 0
    assert report["kv_tokens"] == report["kv_blocks"] * 16
    assert report["dtype"] == "bfloat16"
    assert "attention" in report["kernels"]
    assert report["machine"]["cores"] >= 1
    code, out, _ = says("doctor", "toy", "--port", "0")
    assert "toy can be served here" in out


def test_doctor_judges_by_the_flags_of_serve(says: Says) -> None:
    code, report, _ = doctor(says, "toy", "--dtype", "float32", "--max-model-len", "512",
                             "--max-num-seqs", "3", "--num-gpu-blocks-override", "64")  # fmt: skip
    assert code == 0
    assert (report["dtype"], report["kv_blocks"], report["full_length_sequences"]) == (
        "float32", 64, 2,
    )  # fmt: skip
    _, _, errors = doctor(says, "toy", "--num-gpu-blocks-override", "1")
    assert any("--max-model-len" in error for error in errors)
    _, _, errors = doctor(says, "toy", "--max-model-len", "1m")
    assert any("max_model_len" in error for error in errors)


def test_doctor_tries_the_trace(says: Says, tmp_path: Path) -> None:
    code, _, errors = doctor(says, "toy", "--trace", str(tmp_path / "no" / "t.json"))
    assert code == 1
    assert errors == [f"--trace {tmp_path}/no/t.json cannot be written: No such file or directory"]
    _, _, errors = doctor(says, "toy", "--trace", str(tmp_path))
    assert errors == [f"--trace {tmp_path} cannot be written: Is a directory"]
    there = tmp_path / "there.json"
    there.write_text("an older trace")
    for file in (there, tmp_path / "new.json"):
        assert doctor(says, "toy", "--trace", str(file))[0] == 0
    assert there.read_text() == "an older trace" and list(tmp_path.iterdir()) == [there]


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


def _edit(folder: Path, name: str, **changes: Any) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _rename_a_tensor(folder: Path) -> None:
    """Same length, so that nothing but the name is wrong."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].replace(b"model.norm.weight", b"model.gorm.weight")
    file.write_bytes(data[:8] + header + data[8 + length :])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "truncated weights": (_truncate, "truncated"),
    "renamed tensor": (_rename_a_tensor, "model.norm.weight"),
    "another shape": (lambda f: _edit(f, "config.json", intermediate_size=64), "shape"),
    "another family": (
        lambda f: _edit(f, "config.json", architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel",
    ),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "broken template": (
        lambda f: (f / "chat_template.jinja").write_text("{% if %}"), "chat template",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_with_a_folder(says: Says, toy: Path, damage: str) -> None:
    break_it, word = DAMAGES[damage]
    break_it(toy)
    code, _, errors = doctor(says, str(toy))
    assert code == 1
    assert any(word in error for error in errors), errors
    code, out, _ = says("doctor", str(toy), "--port", "0")
    assert code == 1
    assert "cannot be served here" in out


def test_a_model_without_chat_template_is_a_warning(says: Says, toy: Path) -> None:
    (toy / "chat_template.jinja").unlink(missing_ok=True)
    _edit(toy, "tokenizer_config.json", chat_template=None)
    code, report, _ = doctor(says, str(toy))
    assert code == 0
    warnings = [f["text"] for f in report["findings"] if f["level"] == "warning"]
    assert any("--chat-template" in text for text in warnings)


# banner -------------------------------------------------------------------------------------------


def banner(url: str, *arguments: str, environment: dict[str, str] | None = None) -> Banner:
    config, _ = config_of(make_parser(), ["toy", *arguments], environment or {})
    return Banner(config, Checkpoint(TOY))


def test_the_banner_has_everything_to_begin_with(server: FakeServer) -> None:
    text = banner(server.url, "--port", "9000").text(server.url)
    assert server.url in text
    assert all(prompt in text for prompt in CHAT_PROMPTS)
    assert f"{command()} chat --url {server.url}" in text
    assert f"{command()} serve /path/to/checkpoint --port 9000" in text


def test_the_banner_knows_what_a_shell_knows_us_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = tmp_path / "the venv" / "bin" / "penstock"
    ours.parent.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(ours.with_name("python")))
    monkeypatch.setenv("PATH", os.defpath)
    assert command() == "penstock"  # nothing is there to be called
    ours.touch(mode=0o755)
    assert command() == f"'{ours}'"
    monkeypatch.chdir(tmp_path)
    assert command() == "'the venv/bin/penstock'"
    monkeypatch.setenv("PATH", str(ours.parent))
    assert command() == "penstock"


@pytest.mark.parametrize("key", [None, "it's-$ecret"], ids=["open", "with a key"])
def test_what_the_banner_says_works_when_pasted(server: FakeServer, key: str | None) -> None:
    environment = {"PENSTOCK_API_KEY": key} if key else {}
    shown = banner(server.url, "--served-model-name", "it's a toy", environment=environment)
    if key:
        assert key not in shown.text(server.url)
    done = subprocess.run(
        ["bash", "-c", shown.curl(server.url)], env=os.environ | environment,
        capture_output=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == "twelve"
    done = subprocess.run(
        [sys.executable, "-c", shown.python(server.url)], env=os.environ | environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == CHAT_PROMPTS[1], done.stderr
    for _, body, sent_key in server.requests:
        assert key is None or sent_key == f"Bearer {key}"
        assert body["model"] == "it's a toy"
        assert body["messages"] == [{"role": "user", "content": CHAT_PROMPTS[1]}]
    assert len(server.requests) == 2


def test_without_a_chat_template_the_banner_completes(server: FakeServer, toy: Path) -> None:
    (toy / "chat_template.jinja").unlink(missing_ok=True)
    _edit(toy, "tokenizer_config.json", chat_template=None)
    config, _ = config_of(make_parser(), [str(toy)], {})
    shown = Banner(config, Checkpoint(toy))
    assert "/v1/completions" in shlex.split(shown.curl(server.url))[2]
    exec(compile(shown.python(server.url), "banner", "exec"), {})
    assert server.requests[0][0] == "/v1/completions"


def test_a_quiet_start() -> None:
    said: list[str] = []
    config, _ = config_of(make_parser(), ["toy", "--no-banner"], {})
    Banner(config, Checkpoint(TOY), said.append).show("http://127.0.0.1:1")
    assert said == []
