"""What support/chat.py promises: a conversation's text and ids are those of the chat template that a model was
published with; such a template is recognised, however it is spelled, and never run."""

import json

import pytest

from support import chat
from support.settings import UserError
from support.tokenizer import BEGIN, END, Tokenizer, train_bpe, write_merges

# The published templates, spelled in our own way: the normal form is the same.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role ~ '\\n' }}{{ message.content }}<|im_end|>{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
OWN_SYSTEM = CHATML.replace(
    "messages %}",
    "messages %}{% if loop.first and messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\\nYou \"help\" in Zürich.<|im_end|>\\n' }}{% endif %}",
    1,
)
ALTERNATE = (
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0].content %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}" + ALTERNATE + "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message.content %}"
    "{% else %}{% set content = message.content %}{% endif %}"
    "{% if message.role == 'user' %}{{ bos_token ~ '[INST] ' ~ content | trim ~ ' [/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' ~ content | trim ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% if messages[0].role == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0].content %}{% else %}{% set loop_messages = messages %}"
    f'{{% set system_message = "{chat.VICUNA_SYSTEM}" %}}{{% endif %}}'
    "{% for message in loop_messages %}" + ALTERNATE + "{% if loop.index0 == 0 %}{{ system_message }}{% endif %}"
    "{% if message.role == 'user' %} USER: {{ message.content.strip() }}"
    "{% elif message.role == 'assistant' %} ASSISTANT: {{ message.content.strip() + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
LLAMA3 = """\
{%- set loop_messages = messages %}
{%- for message in loop_messages %}
    {%- set content = "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n"
                      + message.content | trim + "<|eot_id|>" %}
    {%- if loop.index0 == 0 %}
        {%- set content = bos_token + content %}
    {%- endif %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""
ZEPHYR = """{% for message in messages %}
{% if message.role == "user" %}
{{ "<|user|>\\n" + message.content + eos_token }}
{% elif message.role == "system" %}
{{ "<|system|>\\n" + message.content + eos_token }}
{% elif message.role == "assistant" %}
{{ "<|assistant|>\\n" + message.content + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ "<|assistant|>" }}
{% endif %}
{% endfor %}"""
KNOWN = {
    "chatml": CHATML,
    "chatml with a system message of its own": OWN_SYSTEM,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "zephyr": ZEPHYR,
    "vicuna_spaced": VICUNA,
}


def messages(*texts, system=None):
    said = [] if system is None else [{"role": "system", "content": system}]
    return said + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer's folder that has all special tokens of the templates."""
    folder = tmp_path_factory.mktemp("tokenizer")
    names = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    write_merges(folder, train_bpe([LLAMA3, ZEPHYR], 50), {name: 308 + i for i, name in enumerate(names)})
    return folder


def with_template(folder, path, template, file="tokenizer_config.json"):
    """A copy of `folder` that has a chat template in this file."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_text((folder / name).read_text())
    if file == "chat_template.jinja":
        (path / file).write_text(template)
        return path
    saved = json.loads((path / file).read_text()) if (path / file).exists() else {}
    (path / file).write_text(json.dumps(saved | {"chat_template": template}))
    return path


def framed(folder, said):
    """said in the folder's own template → ids."""
    template, system = chat.own_template(folder)
    said = said if system is None or said[0]["role"] == "system" else [{"role": "system", "content": system}, *said]
    return Tokenizer.from_pretrained(folder).encode_chat(said, template)


CHATS = {
    "a question": messages("Hi"),
    "an answer in between, and spaces": messages(" Hi ", "Hello!\n", "Why\nnot? 🎉"),
    "a system message": messages("Hi", "Hello!", "Why?", system="Be kind."),
}


@pytest.mark.parametrize("said", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("name", KNOWN)
def test_a_folders_own_template_frames_as_transformers_does(folder, tmp_path, name, said):
    transformers = pytest.importorskip("transformers")
    path = with_template(folder, tmp_path, KNOWN[name])
    assert chat.own_template(path)[0] == name.split()[0]
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    expected = theirs.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    assert framed(path, said) == expected


def test_chatmls_own_system_message_is_read_from_the_template(folder, tmp_path):
    path = with_template(folder, tmp_path, OWN_SYSTEM)
    assert chat.own_template(path) == ("chatml", 'You "help" in Zürich.')


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_template_is_found_wherever_the_libraries_write_it(folder, tmp_path, file):
    assert chat.own_template(with_template(folder, tmp_path, ZEPHYR, file)) == ("zephyr", None)


def test_of_named_templates_the_default_is_taken(folder, tmp_path):
    named = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": CHATML}]
    assert chat.own_template(with_template(folder, tmp_path, named)) == ("chatml", None)


def test_the_file_of_its_own_goes_before_the_entry(folder, tmp_path):
    """As in transformers, which writes chat_template.jinja since 4.51 and leaves an old entry as it is."""
    with_template(folder, tmp_path, LLAMA2)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert chat.own_template(tmp_path) == ("chatml", None)


UNKNOWN = {
    "another frame": CHATML.replace("im_end", "im_stop"),
    "no question's end": CHATML.replace("add_generation_prompt", "true"),
    "code": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "an endless loop": "{% for i in range(10 ** 12) %}{{ i }}{% endfor %}",
    "no Jinja": "{% for %}",
    "too deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nothing": "",
}


@pytest.mark.parametrize("template", UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_template_is_one_line_that_lists_ours(folder, tmp_path, template):
    with pytest.raises(UserError) as error:
        chat.own_template(with_template(folder, tmp_path, template))
    assert str(error.value).startswith(f"{tmp_path / 'tokenizer_config.json'}: this chat template is not known here")
    assert str(error.value).endswith(f"choose one of {', '.join(chat.TEMPLATES)}")


def test_a_folder_without_a_template_is_one_line(folder):
    with pytest.raises(UserError, match=r"no chat template in tokenizer_config\.json or .*; choose one of plain, "):
        chat.own_template(folder)


def test_llama_31_says_two_dates_whoever_speaks():
    """What transformers 5.23 renders of Llama 3.1's published template."""
    said = "".join(chat.render_chat(messages(" Hi ", system=" Be kind. "), "llama31"))
    assert said == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    alone = "".join(chat.render_chat(messages("Hi"), "llama31"))
    assert "Today Date: 26 Jul 2024\n\n<|eot_id|>" in alone


def test_chatml_keeps_the_spaces_of_a_text():
    said = "".join(chat.render_chat(messages(" Hi ", "a\n"), "chatml"))
    assert said == "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\na\n<|im_end|>\n"


def test_a_saved_tokenizer_keeps_its_chat_template(folder, tmp_path):
    (tmp_path / "one").mkdir()
    one = with_template(folder, tmp_path / "one", ZEPHYR, "chat_template.jinja")
    Tokenizer.from_pretrained(one).save_pretrained(tmp_path / "two")
    assert chat.own_template(tmp_path / "two") == ("zephyr", None)
    assert {BEGIN, END} <= Tokenizer.from_pretrained(tmp_path / "two").special.keys()
