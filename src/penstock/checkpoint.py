"""Where a MODEL argument leads: a folder, a hub id, or `toy`. Shared by service and engine."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from penstock.protocol.errors import CheckpointError

TOY = Path(__file__).parent / "toy"


class Checkpoint:
    """A folder in Hugging Face layout. Reads small JSON files; never tensors."""

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

    def json(self, name: str, *, required: bool = False) -> dict[str, Any]:
        file = self.path / name
        if not file.is_file():
            if required:
                raise CheckpointError(f"{file} is missing: is {self.path} a checkpoint folder?")
            return {}
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as exc:
            raise CheckpointError(f"{file} cannot be read: {exc}") from exc
        if not isinstance(found, dict):
            raise CheckpointError(f"{file} does not hold a JSON object")
        return found


def resolve(model: str, *, revision: str | None = None) -> Checkpoint:
    """Folder, hub id or `toy` to a `Checkpoint`. Raises `CheckpointError` with what to do."""
    if model == "toy":
        return Checkpoint(TOY)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return Checkpoint(folder.resolve())
    if folder.exists():
        raise CheckpointError(f"{model} is a file: give the folder that holds config.json")
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise CheckpointError(f"{model} does not exist: give a checkpoint folder or a hub id")
    return Checkpoint(_download(model, revision))


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except HFValidationError as exc:
        raise CheckpointError(f"{model} is neither a folder nor a hub id: {exc}") from exc
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as exc:
        raise CheckpointError(
            f"{model} is not a folder here, and the hub could not deliver it "
            f"({type(exc).__name__}): check the name and the network, or give a folder"
        ) from exc
