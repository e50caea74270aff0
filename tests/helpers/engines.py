"""Engines in this process, and a service by hand that talks to them in protocol messages."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from penstock.engine.config import EngineConfig, WorkerConfig
from penstock.engine.instance import EngineThread
from penstock.protocol.codec import PROTOCOL_VERSION, Message, decode, encode
from penstock.protocol.instance import Attach, Attached, InstanceCard, Load
from penstock.protocol.kv import Fetch, Fetched, KvSource, block_keys, root_key
from penstock.protocol.request import SamplingParams, Stage, Submit
from penstock.protocol.tokens import Credit, TokenRow, Tokens
from penstock.protocol.transport.open import connect

M = TypeVar("M")
SERVICE = "by-hand"
TIMEOUT_S = 60.0


def engine_thread(folder: Any, name: str, model: str = "toy", **settings: Any) -> EngineThread:
    """A small float32 engine at `folder`/`name`.sock."""
    config = EngineConfig(**_settings(model, settings))
    return EngineThread(WorkerConfig(config, address(folder, name), name=name, incarnation=1))


def _settings(model: str, changes: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": model,
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 4,
        "num_blocks": 64,
        "num_threads": 1,
        "cpu_bind": "none",
        **changes,
    }


def address(folder: Any, name: str) -> str:
    return f"ipc://{folder}/{name}.sock"


@dataclass
class Instance:
    """The service's end of one connection. Attaches at once, and waits for the card."""

    at: str
    name: str
    card: InstanceCard = field(init=False)
    loads: list[Load] = field(default_factory=list)
    rows: dict[str, list[TokenRow]] = field(default_factory=dict)
    others: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.endpoint = connect(self.at, SERVICE, self.name)
        end_s = time.monotonic() + TIMEOUT_S
        attach = encode(Attach(SERVICE, 1, PROTOCOL_VERSION))
        while not self.endpoint.send(self.name, attach):
            assert time.monotonic() < end_s
            time.sleep(0.01)
        self.card = self.wait_for(Attached).card

    def send(self, message: Message) -> None:
        assert self.endpoint.send(self.name, encode(message))

    def poll(self) -> None:
        for _, frame in self.endpoint.drain():
            message = decode(frame)
            if isinstance(message, Tokens):
                for row in message.rows:
                    self.rows.setdefault(row.request_id, []).append(row)
                self.endpoint.send(self.name, encode(Credit(message.number)))
            elif isinstance(message, Load):
                self.loads.append(message)
                self.endpoint.send(self.name, encode(Credit(0)))
            else:
                self.others.append(message)

    def until(self, condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
        end_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end_s, f"it did not happen; heard {self.others}"
            self.poll()
            time.sleep(0.0005)

    def wait_for(self, kind: type[M]) -> M:
        """The next message of this kind."""
        self.until(lambda: any(isinstance(m, kind) for m in self.others))
        found = next(m for m in self.others if isinstance(m, kind))
        self.others.remove(found)
        return found

    def keys(self, ids: list[int]) -> bytes:
        return block_keys(root_key(self.card.model_digest), ids)

    def source(self, num_blocks: int) -> KvSource:
        card = self.card
        return KvSource(card.name, card.incarnation, card.endpoints["control"], num_blocks)

    def submit(self, request_id: str, prompt: list[int], **changes: Any) -> None:
        settings: dict[str, Any] = {
            "request_id": request_id,
            "attempt": 1,
            "service": SERVICE,
            "service_incarnation": 1,
            "prompt_ids": prompt,
            "sampling": SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True),
            **changes,
        }
        settings.setdefault("block_keys", self.keys(prompt + settings.get("resumed_ids", [])))
        self.send(Submit(**settings))

    def finished(self, request_id: str) -> bool:
        rows = self.rows.get(request_id, [])
        return bool(rows) and rows[-1].finish is not None

    def result(self, request_id: str, timeout_s: float = TIMEOUT_S) -> list[int]:
        """All of its tokens; it must end without an error."""
        self.until(lambda: self.finished(request_id), timeout_s)
        rows = self.rows[request_id]
        assert rows[-1].error is None, rows[-1].error
        return [token for row in rows for token in row.ids]

    def run(self, request_id: str, prompt: list[int], **changes: Any) -> list[int]:
        self.submit(request_id, prompt, **changes)
        return self.result(request_id)

    def fetch(self, request_id: str, prompt: list[int], owner: Instance, **changes: Any) -> Fetched:
        keys = self.keys(prompt)
        settings = {
            "request_id": request_id,
            "attempt": 1,
            "keys": keys,
            "source": owner.source(len(keys) // 16),
            "num_tokens": len(prompt) + 1,
            "lease_s": 10.0,
            **changes,
        }
        self.send(Fetch(**settings))
        return self.wait_for(Fetched)

    def close(self) -> None:
        self.endpoint.close()


def handover_plan(prefill: Instance, decode_at: Instance) -> list[Stage]:
    return [Stage("prefill", prefill.name), Stage("decode", decode_at.name)]


class EngineProcess:
    """The same in a process of its own, which a test may stop or kill."""

    def __init__(self, folder: Any, name: str, model: str = "toy", **settings: Any) -> None:
        program = (
            "import sys; from penstock.engine.config import EngineConfig, WorkerConfig;"
            "from penstock.engine.instance import run_worker;"
            "from penstock.protocol import secret;"
            "secret.use(secret.ClusterSecret(b'of the processes of a test'));"
            "config, address, name, parent = eval(sys.argv[1]);"
            "run_worker(WorkerConfig(EngineConfig(**config), address, name=name,"
            " incarnation=1, parent_pid=parent))"
        )
        arguments = (_settings(model, settings), address(folder, name), name, os.getpid())
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, repr(arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)
