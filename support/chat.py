"""Conversations: how a model's questions and answers are framed.

    [{"role", "content"}, …] ─ render_chat, by a key of TEMPLATES ─▶ [text or Special, …] ─ Tokenizer ─▶ ids
    a folder's own chat_template ─ own_template ─▶ a key of TEMPLATES, its system message

A published folder says its frame as a program (Jinja). It is parsed and compared with those of which TEMPLATES has
the like, but never run.
"""

import functools
import hashlib
import json
import re
import time

from support import checkpoint, settings
from support.settings import UserError


class Special(str):
    """A special token by name, in a list of texts. A plain str with the same letters is text."""


BOS, EOS = Special("<s>"), Special("</s>")  # stand for the tokenizer's own bos and eos


def render_chat(messages, template):
    """Messages → [text or Special, …], as a template (a key of TEMPLATES) writes them."""
    if template not in TEMPLATES:
        raise UserError(f'no chat template "{template}"; there are {", ".join(TEMPLATES)}')
    system, turns = check_turns(messages)
    if template not in VERBATIM:
        turns = [(role, text.strip()) for role, text in turns]
    return TEMPLATES[template](system, turns)


def check_turns(messages):
    """Messages → the system's text or None, [(role, text), …] of the others, in turns."""
    if not messages:
        raise UserError("a conversation needs a message")
    first, *rest = messages
    system, turns = (first["content"], rest) if first["role"] == "system" else (None, messages)
    for number, message in enumerate(turns):
        if message["role"] != ("user", "assistant")[number % 2]:
            raise UserError(f"message {number + 1} is of the {message['role']}: user and assistant must take turns")
    if not turns:
        raise UserError("a conversation needs a user's message")
    return system, [(message["role"], message["content"]) for message in turns]


def plain(system, turns):
    """No template: all texts, a line break between them."""
    texts = [] if system is None else [system]
    texts += [text for _, text in turns]
    end = [EOS] if turns[-1][0] == "assistant" else []
    return [BOS, "\n".join(texts), *end]


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def vicuna(system, turns):
    """Vicuna v1.1 (FastChat's "vicuna_v1.1"); without a system message, its usual one."""
    system = VICUNA_SYSTEM if system is None else system
    parts, text = [BOS], f"{system} " if system else ""
    for role, content in turns:
        if role == "user":
            text += f"USER: {content} ASSISTANT:"
        else:
            parts += [f"{text} {content}", EOS]
            text = ""
    return [*parts, text] if text else parts


def vicuna_spaced(system, turns):
    """Vicuna as its chat_template in Jinja has it: no <s>, and a space between an answer's end and USER."""
    parts, text = [], VICUNA_SYSTEM if system is None else system
    for role, content in turns:
        text += f" {role.upper()}: {content}"
        if role == "assistant":
            parts += [text, EOS]
            text = ""
    return [*parts, f"{text} ASSISTANT:"] if text else parts


def llama2(system, turns):
    """Llama 2's chat models (Meta's `chat_completion`): a question with its answer is a text."""
    parts = []
    for number, (role, content) in enumerate(turns):
        if role == "user":
            if number == 0 and system is not None:
                content = f"<<SYS>>\n{system}\n<</SYS>>\n\n{content}"
            parts += [BOS, f"[INST] {content} [/INST]"]
        else:
            parts[-1] += f" {content} "
            parts.append(EOS)
    return parts


def llama3(system, turns):
    """Llama 3's instructed models (Meta's `ChatFormat`)."""
    return with_headers(turns if system is None else [("system", system.strip()), *turns])


def llama31(system, turns, date="26 Jul 2024"):
    """Llama 3.1's and 3.3's: a system message always, and two dates in it; of 3.2's, the second is today's."""
    dates = f"Cutting Knowledge Date: December 2023\nToday Date: {date or time.strftime('%d %b %Y')}\n\n"
    return with_headers([("system", dates + (system or "").strip()), *turns])


def with_headers(turns):
    """[(role, text), …] as Llama 3 frames them."""

    def header(role):
        return [Special("<|start_header_id|>"), role, Special("<|end_header_id|>")]

    parts = [Special("<|begin_of_text|>")]
    for role, content in turns:
        parts += [*header(role), f"\n\n{content}", Special("<|eot_id|>")]
    return [*parts, *header("assistant"), "\n\n"] if turns[-1][0] == "user" else parts


def chatml(system, turns):
    """ChatML: SmolLM2, Qwen, and many fine-tuned models."""
    turns = turns if system is None else [("system", system), *turns]
    parts = []
    for role, content in turns:
        parts += [Special("<|im_start|>"), f"{role}\n{content}", Special("<|im_end|>"), "\n"]
    return [*parts, Special("<|im_start|>"), "assistant\n"] if turns[-1][0] == "user" else parts


def zephyr(system, turns):
    """Zephyr's and TinyLlama's; the names of the roles are mere text."""
    turns = turns if system is None else [("system", system), *turns]
    parts, text = [], ""
    for role, content in turns:
        parts += [f"{text}<|{role}|>\n{content}", EOS]
        text = "\n"
    return [*parts, "\n<|assistant|>\n" if turns[-1][0] == "user" else "\n"]


TEMPLATES = {
    "plain": plain,
    "vicuna": vicuna,
    "llama2": llama2,
    "llama3": llama3,
    "llama31": llama31,
    "llama32": functools.partial(llama31, date=None),
    "chatml": chatml,
    "zephyr": zephyr,
    "vicuna_spaced": vicuna_spaced,
}
VERBATIM = ("chatml", "zephyr")  # these leave the spaces around a text


# ---- a folder's own template -----------------------------------------------------------------

KNOWN = {  # digests of the normal forms of published templates
    "4ec9b91ebb3239e4": "chatml",  # OpenHermes, TRL
    "5fdb6d68914c4eb9": "chatml",  # Hermes, Yi: with a default for add_generation_prompt
    "3a5451b2c1055bd9": "chatml",  # SmolLM2, Qwen 2: with a system message of its own
    "3bb87ea75a9b9496": "llama2",
    "f91800d9457d2fb9": "llama2",  # with a branch for system messages that is never reached
    "3ce41348c73612dd": "llama3",  # the first one: with the answer's header always
    "b665dcfbc3efb697": "llama3",
    "4ef0ab5524c51d4a": "llama31",
    "70c57b886f144405": "llama32",
    "50f5d9e65d29f3eb": "vicuna_spaced",
    "24dec11b2f5b9865": "zephyr",  # and TinyLlama
}


def own_template(folder):
    """The chat template in a folder → (its key in TEMPLATES, the system message that it begins with or None)."""
    file, source = find_template(folder)
    ours = f"choose one of {', '.join(TEMPLATES)}"
    if source is None:
        raise UserError(f"{folder}: no chat template in tokenizer_config.json or chat_template.jinja; {ours}")
    form = normal_form(source)
    # ChatML's own system message differs from model to model
    system = re.search(r'<\|im_start\|>system\\n((?:[^"\\]|\\.)+?)<\|im_end\|>', form)
    form = form.replace(system[1], "") if system else form
    digest = hashlib.sha256(form.encode()).hexdigest()[:16]
    if digest not in KNOWN:
        raise UserError(f"{file}: this chat template is not known here; {ours}")
    return KNOWN[digest], json.loads(f'"{system[1]}"') if system else None


def find_template(folder):
    """The file that transformers reads a folder's chat template from, and its text, or None."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file, settings.read_text(file)
    for name in ("chat_template.json", "tokenizer_config.json"):
        file = folder / name
        saved = checkpoint.read_json(file) if file.exists() else {}
        source = saved.get("chat_template") if isinstance(saved, dict) else None
        if isinstance(source, list):  # several, by name
            named = {entry["name"]: entry["template"] for entry in source if {"name", "template"} <= entry.keys()}
            source = named.get("default")
        if isinstance(source, str):
            return file, source
    return file, None


def normal_form(source):
    """A chat template in Jinja → its statements in one spelling, whatever its quotes, spaces and line breaks."""
    import jinja2  # which torch brings along

    nodes = jinja2.nodes

    def form(node):
        if isinstance(node, nodes.Getattr):  # message.role, message["role"]
            return ["Getitem", form(node.node), form(nodes.Const(node.attr))]
        if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr == "strip":
            return form(nodes.Filter(node.node.node, "trim", node.args, node.kwargs, None, None))
        if isinstance(node, list):
            return statements(node)
        if isinstance(node, nodes.Node):
            fields = [form(value) for _, value in node.iter_fields(exclude=("ctx",))]
            return [type(node).__name__, *fields]
        return node

    def pieces(node):
        """Yields what an expression writes, part by part: texts, and forms of what is no text."""
        if isinstance(node, (nodes.Add, nodes.Concat, nodes.Output)):  # a + b, a ~ b, {{ a }}b
            for part in (node.left, node.right) if isinstance(node, nodes.Add) else node.nodes:
                yield from pieces(part)
        else:
            text = node.data if isinstance(node, nodes.TemplateData) else getattr(node, "value", None)
            yield text if isinstance(text, str) else form(node)

    def statements(body):
        found = []
        for node in body:
            for part in pieces(node) if isinstance(node, nodes.Output) else [form(node)]:
                if isinstance(part, str) and found and isinstance(found[-1], str):
                    found[-1] += part
                else:
                    found.append(part)
        return found

    try:
        tree = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).parse(source)
        return json.dumps(statements(tree.body))
    except (jinja2.TemplateSyntaxError, RecursionError, TypeError):
        return ""
