"""What can never run here is refused at once, with the reason."""

from __future__ import annotations

from penstock.protocol.errors import ContextLengthExceeded, InvalidRequest, ProtocolError
from penstock.protocol.kv import KEY_BYTES
from penstock.protocol.request import Submit


class DuplicateSubmit(ProtocolError):
    """This attempt, or a newer one, is here already; the live sequence is untouched."""


def validate(submit: Submit, max_model_len: int, block_tokens: int) -> None:
    """Raises `ContextLengthExceeded`, `InvalidRequest`, or `ProtocolError` for misshapen keys.

    `max_model_len` counts prompt and output; a prompt must leave room for one token of output.
    """
    num_tokens = len(submit.prompt_ids) + len(submit.resumed_ids)
    if not submit.prompt_ids:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if num_tokens >= max_model_len:
        raise ContextLengthExceeded(
            f"the prompt has {num_tokens} tokens and leaves no room for output: "
            f"at most {max_model_len} tokens fit, prompt and output together",
            param="prompt",
        )
    if len(submit.resumed_ids) >= submit.sampling.max_tokens:
        raise InvalidRequest(
            f"max_tokens is {submit.sampling.max_tokens} and {len(submit.resumed_ids)} tokens "
            "have been generated: nothing is left to do",
            param="max_tokens",
        )
    num_keys, remainder = divmod(len(submit.block_keys), KEY_BYTES)
    if remainder or num_keys > num_tokens // block_tokens:
        raise ProtocolError(
            f"{len(submit.block_keys)} bytes of block keys do not fit {num_tokens} tokens in "
            f"blocks of {block_tokens}"
        )
