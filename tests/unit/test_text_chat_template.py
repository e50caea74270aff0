"""Chat templates, against transformers' `apply_chat_template` on the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tests.helpers.tokenizers import write_tokenizer

from penstock.checkpoint import Checkpoint
from penstock.protocol.errors import CheckpointError, ConfigError, InvalidRequest, TemplateFailed
from penstock.service.text import template_sandbox
from penstock.service.text.chat_template import NoChatTemplate, Template, load_chat_template
from penstock.service.text.tokenizer import Tokenizer

# In the manner of the families' templates: what they use of jinja, not their words.
LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n" }}
{%- if tools is not none %}
    {{- "Functions:\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("One tool call at a time, please.") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if message.role == "user" or (message.role == "assistant" and not message.tool_calls) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the system message, user and assistant must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- else %}
        {{- raise_exception("Unknown role " ~ message["role"]) }}
    {%- endif %}
{%- endfor %}
"""

QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and message.content is string %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content or '' %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {% generation %}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or not loop.first %}{{- '\\n' }}{%- endif %}
            {%- set tool_call = tool_call.function or tool_call %}
            {{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {%- if tool_call.arguments is string %}
                {{- tool_call.arguments }}
            {%- else %}
                {{- tool_call.arguments | tojson }}
            {%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
        {% endgeneration %}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- for d in documents or [] %}{{- d.title ~ ': ' ~ d.text ~ '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# Only parts: content is run over, as templates of models that see images do.
PARTS = """\
{%- for message in messages %}
    {{- '<' + message.role + '>' }}
    {%- for part in message.content %}
        {%- if part.type == 'image' %}{{- '<image>' }}
        {%- elif part.type == 'text' %}{{- part.text }}
        {%- endif %}
    {%- endfor %}
{%- endfor %}
"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather <now> & “here”",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüß dich, 世界 & <all>  "},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello."},
    {"role": "user", "content": "And the weather?"},
]
CALLED = [
    *CHAT,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {
                    "name": "get_weather",
                    "arguments": {"city": "Tromsø", "n": [1, None]},
                },
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "-3 °C"},
]


def loaded(
    folder: Path, kind: str = "llama2", override: str | None = None, **config: Any
) -> Template:
    write_tokenizer(folder, kind, **config)
    checkpoint = Checkpoint(folder)
    return load_chat_template(checkpoint, Tokenizer.from_checkpoint(checkpoint), override)


def openai_form(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As OpenAI clients send it: arguments are a JSON string, content is null beside a call."""
    copy = json.loads(json.dumps(messages))
    for message in copy:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
            message["content"] = None
    return copy


@pytest.mark.parametrize("template", [LLAMA3, MISTRAL, QWEN], ids=["llama3", "mistral", "qwen"])
@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], CALLED], ids=["system", "plain", "called"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_prompts_are_those_of_transformers(
    tmp_path: Path, template: str, messages: list[Any], tools: Any, add_generation_prompt: bool
) -> None:
    ours = loaded(tmp_path, chat_template=template)
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
    options: dict[str, Any] = {"tools": tools, "add_generation_prompt": add_generation_prompt}
    extra = {"enable_thinking": False, "date_string": "22 Nov 2026"}
    try:
        expected = oracle.apply_chat_template(messages, tokenize=False, **options, **extra)
    except Exception as exc:
        with pytest.raises(TemplateFailed, match=str(exc)):
            ours.render(openai_form(messages), kwargs=extra, **options)
        return
    assert ours.render(openai_form(messages), kwargs=extra, **options) == expected


def test_documents_reach_the_template(tmp_path: Path) -> None:
    ours = loaded(tmp_path, chat_template=QWEN)
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
    documents = [{"title": "A", "text": "first"}, {"title": "B", "text": "second"}]
    expected = oracle.apply_chat_template(CHAT, tokenize=False, documents=documents)
    assert ours.render(CHAT, documents=documents, add_generation_prompt=False) == expected
    assert "B: second" in expected


@pytest.mark.parametrize("template", [LLAMA3, MISTRAL, QWEN], ids=["llama3", "mistral", "qwen"])
@pytest.mark.parametrize("last", ["The answer is", "The answer is ", "  x\n"])
def test_a_final_message_can_be_continued(tmp_path: Path, template: str, last: str) -> None:
    ours = loaded(tmp_path, chat_template=template)
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [*CHAT, {"role": "assistant", "content": last}]
    extra = {"date_string": "today"}
    expected = oracle.apply_chat_template(
        messages, tokenize=False, continue_final_message=True, **extra
    )
    options: dict[str, Any] = {"continue_final_message": True, "kwargs": extra}
    assert ours.render(messages, add_generation_prompt=False, **options) == expected
    with pytest.raises(InvalidRequest, match="exclude each other"):
        ours.render(messages, add_generation_prompt=True, **options)
    with pytest.raises(InvalidRequest, match="no text to continue"):
        ours.render([*CHAT, {"role": "assistant", "content": ""}], add_generation_prompt=False,
                    **options)  # fmt: skip


def test_messages_are_left_as_they_were(tmp_path: Path) -> None:
    messages = openai_form([*CALLED, {"role": "assistant", "content": "It is"}])
    before = json.dumps(messages)
    ours = loaded(tmp_path, chat_template=QWEN)
    ours.render(messages, continue_final_message=True, add_generation_prompt=False)
    assert json.dumps(messages) == before


def test_a_template_that_raises_says_so_in_its_own_words(tmp_path: Path) -> None:
    ours = loaded(tmp_path, chat_template=MISTRAL)
    with pytest.raises(TemplateFailed, match=r"^After the system message, user and assistant must"):
        ours.render([CHAT[1], CHAT[1]])
    with pytest.raises(TemplateFailed, match=r"^Unknown role tool"):
        ours.render([CHAT[1], {"role": "tool", "content": "x"}])
    assert ours.render([CHAT[1]]).endswith("[/INST]")


# --- content as strings and as parts ---


def test_parts_are_joined_where_the_template_wants_strings(tmp_path: Path) -> None:
    ours = loaded(tmp_path, chat_template=MISTRAL)
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "[INST] one\ntwo[/INST]" in ours.render([{"role": "user", "content": parts}])
    image = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    with pytest.raises(InvalidRequest, match="image_url") as caught:
        ours.render([{"role": "user", "content": image}])
    assert caught.value.param == "messages[0].content[0]"


def test_strings_become_parts_where_the_template_wants_parts(tmp_path: Path) -> None:
    ours = loaded(tmp_path, chat_template=PARTS)
    assert ours.render([{"role": "user", "content": "one"}]) == "<user>one"
    parts = [{"type": "image"}, {"type": "text", "text": "two"}]
    assert ours.render([{"role": "user", "content": parts}]) == "<user><image>two"


@pytest.mark.parametrize("content", [3, {"text": "x"}])
def test_content_of_another_type_is_refused(tmp_path: Path, content: Any) -> None:
    ours = loaded(tmp_path, chat_template=MISTRAL)
    with pytest.raises(InvalidRequest):
        ours.render([{"role": "user", "content": content}])


def test_bad_requests(tmp_path: Path) -> None:
    ours = loaded(tmp_path, chat_template=QWEN)
    with pytest.raises(InvalidRequest, match="empty"):
        ours.render([])
    broken = openai_form(CALLED)
    broken[4]["tool_calls"][0]["function"]["arguments"] = '{"city": '
    with pytest.raises(InvalidRequest) as caught:
        ours.render(broken)
    assert caught.value.param == "messages[4].tool_calls[0].function.arguments"
    with pytest.raises(InvalidRequest) as caught:
        ours.render(CHAT, kwargs={"messages": []})
    assert caught.value.param == "chat_template_kwargs.messages"


def test_the_developers_role_is_the_systems_for_templates_that_do_not_know_it(
    tmp_path: Path,
) -> None:
    ours = loaded(tmp_path, chat_template=QWEN)
    said = ours.render([{"role": "developer", "content": "Be brief."}, *CHAT[1:]])
    assert said == ours.render(CHAT)


# --- where templates come from ---


def test_a_base_model_has_no_template(tmp_path: Path) -> None:
    ours = loaded(tmp_path)
    assert isinstance(ours, NoChatTemplate)
    with pytest.raises(InvalidRequest, match=r"/v1/completions.*--chat-template"):
        ours.render(CHAT, tools=TOOLS)


def test_a_file_of_its_own_wins_and_the_flag_wins_over_all(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    assert loaded(tmp_path, chat_template="config").render(CHAT) == "file Be brief."
    assert loaded(tmp_path, override="flag {{ eos_token }}").render(CHAT) == "flag </s>"
    given = tmp_path / "mine.jinja"
    given.write_text("mine")
    assert loaded(tmp_path, override=str(given)).render(CHAT) == "mine"
    with pytest.raises(ConfigError, match="no file"):
        loaded(tmp_path, override=str(tmp_path / "absent.jinja"))


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    ours = loaded(tmp_path, chat_template=named)
    assert (ours.render(CHAT), ours.render(CHAT, tools=TOOLS)) == ("d", "t")
    with pytest.raises(InvalidRequest, match="rag"):
        loaded(tmp_path, chat_template=[{"name": "rag", "template": "r"}]).render(CHAT)
    with pytest.raises(CheckpointError, match="no list of templates"):
        loaded(tmp_path, chat_template=["x"])


def test_bad_syntax_is_found_at_start(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="line 2"):
        loaded(tmp_path, chat_template="a\n{% if %}")
    with pytest.raises(ConfigError, match="line 1"):
        loaded(tmp_path, override="{% for x in %}")


# --- the sandbox ---


@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ ''|attr('__class__') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ dict.mro() }}",
        "{% set ns = namespace() %}{% set ns.__html__ = dict %}{{ ns }}",
        "{{ namespace(__call__=dict) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_templates_cannot_leave_the_sandbox(tmp_path: Path, escape: str) -> None:
    ours = loaded(tmp_path, chat_template=escape)
    try:
        said = ours.render(CHAT)
    except TemplateFailed:
        return
    assert said == ""  # jinja's undefined shows as nothing


@pytest.mark.parametrize(
    "bomb",
    [
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999)|select %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set ns = namespace(n=9) %}{% for i in range(60) %}"
        "{% set ns.n = ns.n * ns.n %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}"
        "{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}"
        "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}"
        "{% set ns.s = ns.s.replace('x', 'xxxx') %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}"
        "{% set ns.s = ns.s|replace('x', 'xxxx') %}{% endfor %}",
        "{{ 'x'.center(10 ** 12) }}",
        "{{ 'x'|center(10 ** 12) }}",
        "{{ '%999999999999d'|format(1) }}",
        "{{ '{:>999999999999}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 10 ** 12) }}",
        "{{ ('x' * 10 ** 6).join(['y'] * 10 ** 6) }}",
        "{{ ['y'] * 10 ** 6 | join('x' * 10 ** 6) }}",
        "{% for i in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}",
        "{% for i in [1] recursive %}{% if loop.depth < 40 %}{{ loop(range(9999)) }}{% endif %}"
        "{% endfor %}",
        "{% set x = messages %}{% for i in x recursive %}{{ loop(x) }}{{ loop(x) }}{% endfor %}",
    ],
)
def test_templates_that_run_away_are_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bomb: str
) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 50_000)
    ours = loaded(tmp_path, chat_template=bomb)
    with pytest.raises(TemplateFailed):
        ours.render(CHAT)


@pytest.mark.parametrize(
    "wrong", ["{{ 1 / 0 }}", "{{ messages[0].content + 1 }}", "{{ nothing.at.all }}",
              "{{ tools | tojson(separators=3) }}"],
)  # fmt: skip
def test_whatever_a_template_raises_is_a_template_failure(tmp_path: Path, wrong: str) -> None:
    ours = loaded(tmp_path, chat_template=wrong)
    with pytest.raises(TemplateFailed):
        ours.render(CHAT, tools=TOOLS)


def test_loop_variables_survive_the_counting_of_steps(tmp_path: Path) -> None:
    source = (
        "{% for m in messages if m.role != 'system' %}{{ loop.index }}/{{ loop.length }}"
        "{{ '.' if loop.last else ',' }}{{ loop.revindex0 }}{% else %}none{% endfor %}|"
        "{% for a, b in {'x': 1, 'y': 2}.items() %}{{ a }}{{ b }}{% endfor %}|"
        "{% for x in missing %}{% else %}empty{% endfor %}|"
        "{% for m in messages | map(attribute='role') %}{{ loop.previtem }}{{ m }} {% endfor %}"
    )
    ours = loaded(tmp_path, chat_template=source)
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.render(CHAT) == oracle.apply_chat_template(CHAT, tokenize=False)
