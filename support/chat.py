"""Conversations: how a model's files frame questions and answers.
"""

from support.settings import UserError


class Special(str):
    """A special token by name, in a list of texts. A plain str with the same letters is text."""


BOS, EOS = Special("<s>"), Special("</s>")  # stand for the tokenizer's own bos and eos


def render_chat(messages, template):
    """Messages → [text or Special, …], as a template (a key of TEMPLATES) writes them."""
    if template not in TEMPLATES:
        raise UserError(f'no chat template "{template}"; there are {", ".join(TEMPLATES)}')
    return TEMPLATES[template](*check_turns(messages))


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
    return system, [(message["role"], message["content"].strip()) for message in turns]


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

    def header(role):
        return [Special("<|start_header_id|>"), role, Special("<|end_header_id|>")]

    if system is not None:
        turns = [("system", system.strip()), *turns]
    parts = [Special("<|begin_of_text|>")]
    for role, content in turns:
        parts += [*header(role), f"\n\n{content}", Special("<|eot_id|>")]
    return [*parts, *header("assistant"), "\n\n"] if turns[-1][0] == "user" else parts


TEMPLATES = {"plain": plain, "vicuna": vicuna, "llama2": llama2, "llama3": llama3}
