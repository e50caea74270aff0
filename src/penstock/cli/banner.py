"""What `penstock serve` prints once it is ready: things to paste that work."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from penstock import PROJECT, __version__
from penstock.checkpoint import Checkpoint
from penstock.cli.serve import KEY_VARIABLES
from penstock.service.config import ServeConfig

CHAT_PROMPTS = ("Hello! What can you do?", "What is 7 + 5?", "What is the capital of France?")
TEXT_PROMPTS = ("Once upon a time", "It was a bright cold day in April, and", "The capital of")


class Banner:
    def __init__(
        self, config: ServeConfig, checkpoint: Checkpoint, out: Callable[[str], None] | None = None
    ) -> None:
        self._config = config
        self._name = config.served_model_names[0]
        self._chats = config.chat_template is not None or has_chat_template(checkpoint)
        self._print = out or (lambda text: print(text, flush=True))

    def show(self, url: str) -> None:
        if self._config.banner:
            self._print(self.text(url))

    def text(self, url: str) -> str:
        head = f"{PROJECT.capitalize()} {__version__} serves {self._name} at {url}"
        if url.startswith("unix:"):
            return f"\n{head}\n"
        prompts = CHAT_PROMPTS if self._chats else TEXT_PROMPTS
        parts = [
            head + "  (Ctrl-C stops it)",
            "Three prompts to try:\n" + "\n".join(f"  {prompt}" for prompt in prompts),
            f"In the terminal:\n{command()} chat --url {url}{self._key_flag()}",
            "With curl:\n" + self.curl(url),
            "In Python (pip install openai):\n" + self.python(url),
        ]
        if self._config.model == "toy":
            parts.append(
                "This is the small carried model. Your own checkpoint, a folder or a hub id:\n"
                f"{command()} serve /path/to/checkpoint --port {self._config.port}\n"
                f"PORT={self._config.port} MODEL=/path/to/checkpoint make serve"
            )
        return "\n" + "\n\n".join(parts) + "\n"

    def curl(self, url: str) -> str:
        path, body = self._request(stream=False)
        words = ["curl", "-s", f"{url}/v1/{path}", "-H", "Content-Type: application/json"]
        if self._config.api_keys:
            words += ["-H", f"Authorization: Bearer ${KEY_VARIABLES[0]}"]
        quoted = " ".join(_quote(word) for word in words)
        return f"{quoted} -d {shlex.quote(json.dumps(body))}"

    def python(self, url: str) -> str:
        path, body = self._request(stream=True)
        key = f'os.environ["{KEY_VARIABLES[0]}"]' if self._config.api_keys else '"none"'
        call = "chat.completions.create" if path == "chat/completions" else "completions.create"
        text = 'chunk.choices[0].delta.content or ""' if self._chats else "chunk.choices[0].text"
        arguments = ", ".join(f"{name}={value!r}" for name, value in body.items())
        # Without an indented block that a shell would wait for the end of.
        return "\n".join(
            [
                *(["import os"] if self._config.api_keys else []),
                "from openai import OpenAI",
                f'client = OpenAI(base_url="{url}/v1", api_key={key})',
                f"stream = client.{call}({arguments})",
                f'print("".join({text} for chunk in stream))',
            ]
        )

    def _request(self, stream: bool) -> tuple[str, dict[str, object]]:
        body: dict[str, object] = {"model": self._name}
        if self._chats:
            body["messages"] = [{"role": "user", "content": CHAT_PROMPTS[1]}]
        else:
            body |= {"prompt": TEXT_PROMPTS[0], "max_tokens": 32}
        if stream:
            body["stream"] = True
        return ("chat/completions" if self._chats else "completions"), body

    def _key_flag(self) -> str:
        return f" --api-key ${KEY_VARIABLES[0]}" if self._config.api_keys else ""


def command() -> str:
    """What a shell in this folder knows us by: where the environment that we are installed in is
    not active there, as after `make serve`, the path of our command."""
    ours = Path(sys.executable).with_name(PROJECT)
    found = shutil.which(PROJECT)
    if not ours.is_file() or (found is not None and Path(found) == ours):
        return PROJECT
    here = Path.cwd()
    return shlex.quote(str(ours.relative_to(here) if ours.is_relative_to(here) else ours))


def has_chat_template(checkpoint: Checkpoint) -> bool:
    in_config = checkpoint.json("tokenizer_config.json").get("chat_template")
    return bool(in_config) or (checkpoint.path / "chat_template.jinja").is_file()


def _quote(word: str) -> str:
    """Quoted for a shell, but variables stay alive."""
    return f'"{word}"' if "$" in word else shlex.quote(word)
