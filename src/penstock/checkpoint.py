"""Where a MODEL argument leads: a folder, a GGUF file, a hub id, or `toy`. Shared by service and
engine."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from penstock.protocol.errors import CheckpointError

TOY = Path(__file__).parent / "toy"


class Checkpoint:
    """A folder in Hugging Face layout. Reads small text files; never tensors. Everything that is
    not a tensor is asked for here, so that what is no folder can answer too (`gguf.checkpoint`)."""

    #: Where the model's dimensions are from, for messages.
    describes_itself_in = "config.json"

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.json("config.json", required=True)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        return self.json("generation_config.json")

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """generation_config's list wins over config's, as in transformers."""
        found = self.generation_config.get("eos_token_id", self.config.get("eos_token_id"))
        if found is None:
            return ()
        return tuple(found) if isinstance(found, list) else (int(found),)

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def text(self, name: str) -> str | None:
        """A file's text; None if there is no such file."""
        if not self.has(name):
            return None
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise CheckpointError(f"{self.path / name} cannot be read: {exc}") from exc

    def json(self, name: str, *, required: bool = False) -> dict[str, Any]:
        file = self.path / name
        text = self.text(name)
        if text is None:
            if required:
                raise CheckpointError(f"{file} is missing: is {self.path} a checkpoint folder?")
            return {}
        try:
            found = json.loads(text)
        except json.JSONDecodeError as exc:
            raise CheckpointError(f"{file} cannot be read: {exc}") from exc
        if not isinstance(found, dict):
            raise CheckpointError(f"{file} does not hold a JSON object")
        return found


def resolve(model: str, *, revision: str | None = None) -> Checkpoint:
    """Folder, GGUF file, hub id or `toy` to a `Checkpoint`. Raises `CheckpointError` with what to
    do."""
    from penstock.gguf.checkpoint import (
        GgufCheckpoint,
        is_gguf,
        only_gguf,
    )  # which imports this module

    if model == "toy":
        return Checkpoint(TOY)
    path = Path(model).expanduser()
    if path.is_dir():
        file = only_gguf(path.absolute())
        return Checkpoint(path.resolve()) if file is None else GgufCheckpoint(file)
    named_gguf = path.suffix.lower() == ".gguf"
    if path.exists() and (named_gguf or is_gguf(path)):
        return GgufCheckpoint(path.absolute())  # not resolved: parts are found by their names
    if path.exists():
        raise CheckpointError(
            f"{model} is a file, but no GGUF file: give one, or the folder that holds config.json"
        )
    if path.parent.is_file():
        raise CheckpointError(f"{model} does not exist: {path.parent} is a file")
    # A hub id is a name, or two with a slash between them.
    if named_gguf or model.startswith(("/", ".", "~")) or model.count("/") > 1 or model[-1:] == "/":
        raise CheckpointError(f"{model} does not exist: there is no such file or folder")
    return Checkpoint(_download(model, revision))


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except HFValidationError as exc:
        raise CheckpointError(f"{model} is neither a path nor a hub id: {exc}") from exc
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as exc:
        raise CheckpointError(
            f"{model} is no file or folder here, and the hub could not deliver it "
            f"({type(exc).__name__}): check the name and the network, or give a folder"
        ) from exc
