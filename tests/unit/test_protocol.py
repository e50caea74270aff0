"""Messages survive the wire, garbage does not get through it, and keys name prefixes."""

from __future__ import annotations

import builtins
import hashlib
import struct
import types
import typing
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.protocol import codec, errors, kv
from penstock.protocol.codec import Message, decode, encode
from penstock.protocol.errors import ErrorInfo, PenstockError, ProtocolError, VersionMismatch
from penstock.protocol.kv import BLOCK_TOKENS, KvChange, KvEvents, block_keys, next_key, root_key
from penstock.protocol.request import Constraint, SamplingParams, Stage, Submit
from penstock.protocol.tokens import TokenLogprobs, TokenRow, Tokens

_ids = st.lists(st.integers(0, 2**31 - 1), max_size=40)


def _message_types() -> list[type]:
    found: list[type] = []
    for part in get_args(Message):
        found += list(get_args(part)) or [part]
    return sorted(set(found), key=lambda kind: kind.__name__)


def test_every_kind_of_message_is_listed() -> None:
    names = {kind.__name__ for kind in _message_types()}
    assert {"Submit", "Tokens", "KvEvents", "Load", "Pull", "Encoded", "Credit"} <= names
    tags = [kind.__struct_config__.tag for kind in _message_types()]  # type: ignore[attr-defined]
    assert len(set(tags)) == len(tags)


def _values(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a field's annotation, every field of a struct filled in."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        fields = get_type_hints(kind)
        return st.builds(kind, **{name: _values(fields[name]) for name in kind.__struct_fields__})
    if kind is int:
        return st.integers(-(2**63), 2**63 - 1)  # as they travel
    if kind is float:
        return st.floats(allow_nan=False)
    arguments = get_args(kind)
    match get_origin(kind):
        case typing.Literal:
            return st.sampled_from(arguments)
        case types.UnionType | typing.Union:
            return st.one_of(*map(_values, arguments))
        case builtins.list:
            return st.lists(_values(arguments[0]), max_size=3)
        case builtins.tuple:
            return st.lists(_values(arguments[0]), max_size=3).map(tuple)
        case builtins.dict:
            return st.dictionaries(_values(arguments[0]), _values(arguments[1]), max_size=3)
    return st.from_type(kind)


@pytest.mark.parametrize("kind", _message_types(), ids=lambda kind: kind.__name__)
def test_a_message_comes_back_as_it_was(kind: type) -> None:
    @settings(max_examples=50)
    @given(_values(kind))
    def round_trip(message: Message) -> None:
        assert decode(encode(message)) == message

    round_trip()


@given(st.binary(max_size=200))
def test_garbage_raises_a_protocol_error(frame: bytes) -> None:
    try:
        message = decode(frame)
    except ProtocolError:
        return
    # Bytes that happen to be a message are one: they must encode to something that decodes equal.
    assert decode(encode(message)) == message


@given(st.binary(max_size=100), st.sampled_from([0, 1]))
def test_garbage_behind_a_good_head_raises_a_protocol_error(body: bytes, head: int) -> None:
    try:
        decode(bytes((codec.PROTOCOL_VERSION, head)) + body)
    except ProtocolError as exc:
        assert not isinstance(exc, VersionMismatch)


@given(st.data())
def test_a_damaged_message_is_an_error_or_another_message(data: st.DataObject) -> None:
    frame = bytearray(encode(_submit()))
    place = data.draw(st.integers(0, len(frame) - 1))
    frame[place] ^= data.draw(st.integers(1, 255))
    try:
        decode(bytes(frame))
    except ProtocolError:
        pass


@given(st.integers(0, 300))
def test_a_truncated_message_is_an_error(cut: int) -> None:
    frame = encode(_submit())
    with pytest.raises(ProtocolError):
        decode(frame[: min(cut, len(frame) - 1)])


@given(st.integers(0, 255).filter(lambda version: version != codec.PROTOCOL_VERSION))
def test_another_version_says_both_versions(version: int) -> None:
    with pytest.raises(VersionMismatch) as caught:
        decode(bytes((version,)) + encode(_submit())[1:])
    assert str(version) in caught.value.message
    assert str(codec.PROTOCOL_VERSION) in caught.value.message


def test_a_field_of_another_type_is_named() -> None:
    body = msgspec.msgpack.encode({"type": "probe", "nonce": "seven"})
    with pytest.raises(ProtocolError, match="nonce"):
        decode(bytes((codec.PROTOCOL_VERSION, 0)) + body)


@pytest.mark.parametrize(
    "unknown", [b"\xa1\xff", b"\x91" * 100_000 + b"\xc0"], ids=["utf8", "deep"]
)
def test_what_the_decoder_itself_stumbles_over(unknown: bytes) -> None:
    """Text that is not UTF-8 and absurd nesting, in a field that would be passed over."""
    body = b"\x83\xa4type\xa5probe\xa5nonce\x07" + b"\xa1x" + unknown
    try:
        assert decode(bytes((codec.PROTOCOL_VERSION, 0)) + body) == codec.Probe(7)
    except ProtocolError:
        pass


def test_a_field_that_a_newer_release_added_is_passed_over() -> None:
    body = msgspec.msgpack.encode({"type": "probe", "nonce": 7, "new_field": [1]})
    assert decode(bytes((codec.PROTOCOL_VERSION, 0)) + body) == codec.Probe(7)


def test_a_step_of_one_token_is_small_on_the_wire() -> None:
    """Tokens are the traffic: structs as arrays, so that names do not travel with every row."""
    row = TokenRow("req-0123456789", 1, 57, [1234])
    message = Tokens("engine-0", 1, 99, [row] * 64)
    assert len(encode(message)) < 64 * 32


def _submit() -> Submit:
    return Submit(
        request_id="r",
        attempt=2,
        service="s",
        service_incarnation=3,
        prompt_ids=[1, 2, 3],
        sampling=SamplingParams(max_tokens=5, logit_bias={7: -1.5}, stop_token_ids=(9,)),
        resumed_ids=[4],
        constraint=Constraint("regex", "a+"),
        plan=[Stage("decode", "engine-0", 1)],
        total_budget_s=1.5,
    )


# Errors -------------------------------------------------------------------------------------------


def _all_errors(root: type[PenstockError] = PenstockError) -> list[type[PenstockError]]:
    """Those that cross processes; a process may have subclasses that stay inside it."""
    children = [cls for cls in root.__subclasses__() if cls.__module__ == errors.__name__]
    return [root, *(found for child in children for found in _all_errors(child))]


@pytest.mark.parametrize("cls", _all_errors(), ids=lambda cls: cls.__name__)
def test_an_error_comes_back_as_its_class(cls: type[PenstockError]) -> None:
    error = cls("what to do", param="n", retry_after_s=1.5)
    packed = msgspec.msgpack.encode(error.info())
    back = errors.from_info(msgspec.msgpack.decode(packed, type=ErrorInfo))
    assert type(back) is cls
    assert (back.message, back.param, back.retry_after_s) == ("what to do", "n", 1.5)
    assert str(back) == "what to do"


def test_codes_are_unique_and_statuses_are_errors() -> None:
    classes = _all_errors()
    assert len({cls.code for cls in classes}) == len(classes)
    assert all(400 <= cls.http_status < 600 for cls in classes)


def test_the_documented_tree_is_the_tree() -> None:
    doc = errors.__doc__ or ""
    assert all(cls.__name__ in doc for cls in _all_errors())


def test_an_unknown_code_is_still_an_error_with_its_message() -> None:
    error = errors.from_info(ErrorInfo("from_the_future", "later"))
    assert type(error) is PenstockError
    assert error.message == "later"


# Block keys ---------------------------------------------------------------------------------------


@given(_ids, st.binary(min_size=16, max_size=16))
def test_keys_are_the_documented_chain_of_hashes(ids: list[int], root: bytes) -> None:
    """Against the definition, written out once more with struct and hashlib."""
    expected, parent = [], root
    for start in range(0, len(ids) // BLOCK_TOKENS * BLOCK_TOKENS, BLOCK_TOKENS):
        words = struct.pack(f"<{BLOCK_TOKENS}I", *ids[start : start + BLOCK_TOKENS])
        parent = hashlib.sha256(parent + words).digest()[:16]
        expected.append(parent)
    assert kv.split_keys(block_keys(root, ids)) == expected


@given(_ids, _ids)
def test_equal_keys_mean_equal_prefixes(a: list[int], b: list[int]) -> None:
    root = root_key("model")
    keys_a, keys_b = (kv.split_keys(block_keys(root, ids)) for ids in (a, b))
    shared = 0
    while shared < min(len(a), len(b)) and a[shared] == b[shared]:
        shared += 1
    for index, (key_a, key_b) in enumerate(zip(keys_a, keys_b)):
        assert (key_a == key_b) == (shared >= (index + 1) * BLOCK_TOKENS)


@given(st.lists(st.integers(0, 99), min_size=64, max_size=64), st.integers(0, 4))
def test_keys_can_be_continued(ids: list[int], at: int) -> None:
    """Hashing on from a block's key gives what hashing from the start gives."""
    root = root_key("model")
    head, tail = ids[: at * BLOCK_TOKENS], ids[at * BLOCK_TOKENS :]
    packed = block_keys(root, head)
    parent = packed[-16:] or root
    assert packed + block_keys(parent, tail) == block_keys(root, ids)
    if tail:
        assert next_key(parent, tail[:BLOCK_TOKENS]) == block_keys(parent, tail)[:16]


def test_the_root_covers_everything_else_that_decides_the_content() -> None:
    roots = [
        root_key("m"), root_key("n"), root_key("m", "adapter"), root_key("m", salt="s"),
        root_key("m", inputs=[b"x"]), root_key("m", inputs=[b"x", b"y"]),
        root_key("m", inputs=[b"xy"]), root_key("ma"), root_key("m", "a"), root_key("m", salt="a"),
    ]  # fmt: skip
    assert len(set(roots)) == len(roots)


def test_packed_events_and_logprobs_come_back() -> None:
    keys = block_keys(root_key("m"), list(range(32)))
    events = KvEvents("e", 1, 2, [KvChange("stored", keys), KvChange("cleared")])
    assert decode(encode(events)) == events
    row = TokenRow("r", 0, 0, [5], "stop", 5, [TokenLogprobs(5, -0.25, 1, [5, 6], [-0.25, -2.0])])
    assert decode(encode(Tokens("e", 1, 1, [row]))) == Tokens("e", 1, 1, [row])
