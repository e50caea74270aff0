"""The text side of a checkpoint: what the API and `LLM` need of this package, in one object."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.checkpoint import Checkpoint
from penstock.service.text.chat_template import Message, Template, load_chat_template
from penstock.service.text.pipeline import OutputOptions, OutputPipeline
from penstock.service.text.reasoning import ReasoningParser, reasoning_parser_factory
from penstock.service.text.tokenizer import Tokenizer
from penstock.service.text.tools import IdFactory, ToolParser, tool_parser_factory


def random_call_id() -> str:
    return "call_" + secrets.token_hex(12)


@dataclass(frozen=True, slots=True)
class Texts:
    tokenizer: Tokenizer
    template: Template
    tool_parser: Callable[[IdFactory], ToolParser] | None = None
    reasoning_parser: Callable[[str], ReasoningParser] | None = None

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        chat_template: str | None = None,
        tool_call_parser: str | None = None,
        reasoning_parser: str | None = None,
    ) -> Texts:
        """The arguments are the server's flags. Raises `CheckpointError` or `ConfigError`."""
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
        return cls(
            tokenizer,
            load_chat_template(checkpoint, tokenizer, chat_template),
            tool_parser_factory(tool_call_parser),
            reasoning_parser_factory(reasoning_parser),
        )

    def render_chat(self, messages: Sequence[Message], **options: Any) -> str:
        """See `Template.render`. The text is to be encoded with `add_special_tokens=False`."""
        return self.template.render(messages, **options)

    def pipeline(
        self,
        prompt_ids: Sequence[int] = (),
        *,
        stops: tuple[str, ...] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        tools: bool = False,
        reasoning: bool = False,
        new_call_id: IdFactory = random_call_id,
    ) -> OutputPipeline:
        """One choice's pipeline. `tools` and `reasoning`: parse for them if a parser is set."""
        options = OutputOptions(
            stops=stops,
            include_stop_str_in_output=include_stop_str_in_output,
            skip_special_tokens=skip_special_tokens,
            min_tokens=min_tokens,
            tools=self.tool_parser if tools else None,
            reasoning=self.reasoning_parser if reasoning else None,
        )
        return OutputPipeline(self.tokenizer, prompt_ids, options, new_call_id=new_call_id)
