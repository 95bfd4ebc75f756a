"""Formats: one row of JSON, as published data sets have it → Pair | Document | Conversation.

    format                keys of a row                        becomes
    captions              image, caption (and other names)     Pair
    MMC4                  text_list, image_info, instruction   Document (Zhu et al. 2023, arXiv 2304.06939)
    OBELICS               images, texts                        Document (Laurençon et al. 2023, 2306.16527)
    LLaVA, ShareGPT       conversations: from, value; image    Conversation (Liu et al. 2023, 2304.08485)
    messages (OpenAI)     messages: role, content              Conversation
    Alpaca and its kin    instruction, input, output           Conversation

A row is read as those who made its format read it. Whatever else it is has a name: `read_row` says
in a ValueError what the row lacks, or what is to be done with it. Nothing here opens a file.
"""

import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from support.chat import Special, render_chat
from support.settings import UserError, parse_json

# ---- the types of rows ---------------------------------------------------------------------------
# A picture is whatever its source can open: a file's name, an Item of support/sources.py.


@dataclass(frozen=True)
class Picture:
    """A picture alone."""

    picture: object

    @property
    def pictures(self):
        return [self.picture]


@dataclass(frozen=True)
class Pair(Picture):
    """A picture and its caption."""

    caption: str


@dataclass(frozen=True)
class Captioned(Picture):
    """A picture and all its captions, maybe none: `pair` takes one of them."""

    captions: list

    def pair(self, rng):
        """The Pair with one caption, drawn by `rng` if there are several."""
        if not self.captions:
            raise ValueError("it has no caption")
        return Pair(self.picture, pick(self.captions, rng))


@dataclass(frozen=True)
class Document:
    """Texts with pictures between them."""

    pieces: list  # [(text, the picture after it or None), …] in reading order
    prompt: str | None = None  # the instruction that it answers

    @property
    def pictures(self):
        return [picture for _, picture in self.pieces if picture is not None]


@dataclass(frozen=True)
class Conversation:
    """Questions and answers about pictures."""

    messages: list  # as in Tokenizer.encode_chat, "<image>" or "<dream>" where a picture stands
    pictures: list  # one for each of these, in reading order
    left_out: str = ""  # what of the row is not among them


# ---- conversations: where their pictures stand ---------------------------------------------------

# Placeholders in raw texts; they never become tokens of a sequence.
IMAGE, DREAM = Special("<image>"), Special("<dream>")
PLACEHOLDER = re.compile(f"({IMAGE}|{DREAM})")


def frame_messages(messages, template, system):
    """Messages → [text or Special, …] as the template writes them, IMAGE and DREAM among them.

    system: the system message, if `messages` has none; None: what the template says by itself.
    """
    if system is not None and messages[:1] and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    parts = []
    for part in render_chat(messages, template):
        if isinstance(part, Special):
            parts.append(part)
            continue
        for text in PLACEHOLDER.split(part):
            if text:
                parts.append(Special(text) if text in (IMAGE, DREAM) else text)
    return parts


def is_placeholder(part):
    """Whether a part of `frame_messages` stands for a picture."""
    return isinstance(part, Special) and part in (IMAGE, DREAM)


def check_count(parts, pictures):
    """Raises a ValueError unless there is one picture for each placeholder."""
    if (count := sum(map(is_placeholder, parts))) != len(pictures):
        raise ValueError(f"{count} × <image> or <dream> in its texts, but {len(pictures)} pictures")


# ---- values --------------------------------------------------------------------------------------

TYPES = {str: "a text", int: "a whole number", list: "a list", dict: "a table"}


def require_type(wanted, value, where):
    """`value`, if it is of the type `wanted` (a key of TYPES); else a ValueError about `where`."""
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise ValueError(f"{where} is {json.dumps(value)[:40]}, not {TYPES[wanted]}")
    if isinstance(value, str):
        value.encode()  # half a surrogate pair is a ValueError too
    return value


def require_list(wanted, row, key):
    """row[key], if it is a list whose items are all of the type `wanted`."""
    items = require_type(list, row[key], key)
    for i, item in enumerate(items):
        require_type(wanted, item, f"{key}[{i}]")
    return items


def picture_name(value, where):
    """How a row names a picture: a text, or the table {"path": …} that `datasets` writes."""
    if isinstance(value, dict) and value.get("path"):
        value, where = value["path"], f"{where}.path"
    if isinstance(value, dict) and value.get("bytes"):
        raise ValueError(f"{where} holds a picture's bytes: write them to a file, and its name here")
    return require_type(str, value, where)


def picture_names(row):
    """A row's pictures: "image" or "images", a name or a list of names; null and "" are none."""
    names = []
    for key in ("image", "images"):
        value = row.get(key)
        for i, name in enumerate(value if isinstance(value, list) else [value]):
            if name not in (None, ""):
                names.append(picture_name(name, f"{key}[{i}]" if isinstance(value, list) else key))
    return names


def caption_list(value, where="caption"):
    """A data set's caption → the texts that it is: one, or several. null, NaN and "" are none.

    A ValueError if it is anything else.
    """
    captions = []
    for text in value if isinstance(value, list) else [value]:
        if text is None or (isinstance(text, float) and math.isnan(text)):
            continue
        if require_type(str, text, where).strip():
            captions.append(text)
    return captions


def pick(captions, rng=None):
    """One of several captions, drawn by `rng`; without an `rng` the first."""
    return captions[0 if rng is None or len(captions) == 1 else int(rng.integers(len(captions)))]


# ---- captions and documents ----------------------------------------------------------------------


def parse_captions(row, image="image", caption="caption"):
    """{image: a name, caption: a text or a list of texts} → Captioned."""
    return Captioned(picture_name(row[image], image), caption_list(row[caption], caption))


def parse_mmc4(row):
    """{"text_list": [text, …], "image_info": [{"image_name", "matched_text_index"}, …]} → Document.

    Each picture stands behind the text that it matches. "instruction", if there is one, is what the
    document answers.
    """
    texts = require_list(str, row, "text_list")
    names_after = [[] for _ in texts]  # of each text: the pictures behind it
    for i, info in enumerate(require_list(dict, row, "image_info")):
        where = f"image_info[{i}]"
        key = "local_path" if "local_path" in info and "image_name" not in info else "image_name"
        name = require_type(str, info.get(key), f"{where}.{key}")
        index = require_type(int, info.get("matched_text_index"), f"{where}.matched_text_index")
        if not 0 <= index < len(texts):
            wrong = f"{index} is not the index of one of the {len(texts)} texts"
            raise ValueError(f"{where}.matched_text_index {wrong}")
        names_after[index].append(name)
    pieces = []
    for text, names in zip(texts, names_after, strict=True):
        pieces.append((text, names[0] if names else None))
        pieces += [("", name) for name in names[1:]]
    prompt = row.get("instruction")
    return Document(pieces, None if prompt is None else require_type(str, prompt, "instruction"))


def parse_obelics(row):
    """{"images": […], "texts": […]}, two lists in reading order → Document.

    At each index one of them has a picture's name or a text, and the other null.
    """
    images = require_type(list, row["images"], "images")
    texts = require_type(list, row["texts"], "texts")
    if len(images) != len(texts):
        counts = f"{len(images)} images but {len(texts)} texts"
        raise ValueError(f"{counts}: one of each pair must be null")
    pieces = []
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        if image is not None and text is not None:
            both = f"images[{i}] and texts[{i}] are both set"
            raise ValueError(f"{both}: one of each pair must be null")
        if image is not None:
            pieces.append(("", picture_name(image, f"images[{i}]")))
        elif text is not None:
            pieces.append((require_type(str, text, f"texts[{i}]"), None))
    return Document(pieces)


# ---- conversations -------------------------------------------------------------------------------

ROLES = {  # who speaks, in capitals or not → the role of the message
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "prompter": "user",  # OpenAssistant
    "chatgpt": "assistant",  # ShareGPT, by what wrote the answer
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",  # Gemma
    "developer": "system",  # OpenAI, of later models
    "obj365": "assistant",  # DreamLLM's files, by the data set that an answer is from
    "vg": "assistant",
}
# keys of a row or a turn that must not be lost in silence: films, sounds, calls of tools, thoughts
UNREAD = "video", "videos", "audio", "audios", "tools", "functions"
UNREAD += "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "refusal"


def parse_conversation(row, key):
    """{key: [{"from", "value"} or {"role", "content"}, …], "image": names} → Conversation.

    "from" is a key of ROLES, "value" a text in which <image> or <dream> stands for a picture; the
    pictures are named by the row in their order, or by a turn itself. "system" may be the row's
    own. ShareGPT cuts long chats, so that some begin with an answer: as in FastChat and LLaVA that
    turn is left out.
    """
    refuse_unread(row, "it")
    messages, named = [], []  # of each message: the pictures that it names itself
    if row.get("system"):
        messages.append({"role": "system", "content": require_type(str, row["system"], "system")})
        named.append([])
    for i, turn in enumerate(require_list(dict, row, key)):
        message, names = parse_turn(turn, f"{key}[{i}]")
        messages.append(message)
        named.append(names)
    roles = [message["role"] for message in messages]
    start, first = int(roles[:1] == ["system"]), roles.index("user") if "user" in roles else 0
    left_out = ""
    if set(roles[start:first]) == {"assistant"}:
        del messages[start:first], named[start:first]
        left_out = "an answer before the first question"
    pictures = [*itertools.chain.from_iterable(named), *picture_names(row)]
    try:
        check_count(frame_messages(messages, "plain", None), pictures)
    except UserError as error:  # user and assistant do not take turns
        raise ValueError(str(error)) from None
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("it has no answer")
    return Conversation(messages, pictures, left_out)


def refuse_unread(table, where):
    """Raises a ValueError if a row or a turn says more than is read of it."""
    for name in UNREAD:
        if table.get(name) not in (None, "", "[]", []):
            raise ValueError(f'{where} has "{name}", which is not read here')
    if table.get("weight") == 0:  # OpenAI: an answer that is not to be learned
        raise ValueError(f"{where} has weight 0: every answer is learned here")


def parse_turn(turn, where):
    """A turn of a conversation → (its message, the pictures that it names itself)."""
    refuse_unread(turn, where)
    key = "role" if "role" in turn else "from"
    speaker = require_type(str, turn.get(key), f"{where}.{key}")
    if speaker.lower() not in ROLES:
        raise ValueError(f'{where}.{key} is "{speaker}": one of {", ".join(ROLES)}')
    key = "content" if "content" in turn else "value"
    if isinstance(turn.get(key), list):
        text, names = parse_parts(turn[key], f"{where}.{key}")
    else:
        text, names = require_type(str, turn.get(key), f"{where}.{key}"), []
    if re.search("<img>.*?</img>", text):  # Qwen-VL
        raise ValueError(f'{where}.{key} has <img>…</img>: write <image> there, and the name into "image"')
    if "modal_info" in turn:
        names = parse_modal_info(text, turn["modal_info"], f"{where}.modal_info")
    return {"role": ROLES[speaker.lower()], "content": text}, names


def parse_parts(parts, where):
    """OpenAI's [{"type": "text", "text"} or {"type": "image_url", "image_url"}, …] → text, names.

    A picture becomes <image> in a line of its own. {"type": "image"} may have its name under
    "image", "path" or "url", or leave it to the row's "images".
    """
    lines, names = [], []
    for i, part in enumerate(parts):
        require_type(dict, part, f"{where}[{i}]")
        match part.get("type"):
            case "text" | "input_text":
                lines.append(require_type(str, part.get("text"), f"{where}[{i}].text"))
            case "image" | "image_url" | "input_image":
                lines.append(IMAGE)
                value = next((part[key] for key in ("image_url", "image", "path", "url") if part.get(key)), None)
                if isinstance(value, dict) and "url" in value:
                    value = value["url"]
                if value is not None:
                    names.append(picture_name(value, f"{where}[{i}]"))
            case other:
                raise ValueError(f"{where}[{i}].type is {json.dumps(other)[:40]}: only text and images are read")
    return "\n".join(lines), names


def parse_modal_info(text, info, where):
    """DreamLLM's {"<image>": ["image", [name, …]], …} → names, in the order of the placeholders."""
    remaining = {}
    for placeholder, value in require_type(dict, info, where).items():
        modality, names = value if isinstance(value, list) and len(value) == 2 else (None, None)
        if placeholder not in (IMAGE, DREAM) or modality != "image" or not isinstance(names, list):
            raise ValueError(f'{where} is not {{"<image>" or "<dream>": ["image", [name, …]]}}')
        remaining[placeholder] = [require_type(str, name, where) for name in names]
    ordered = []
    for placeholder in PLACEHOLDER.findall(text):
        if not remaining.get(placeholder):
            raise ValueError(f"{where} names too few pictures for {placeholder}")
        ordered.append(remaining[placeholder].pop(0))
    if any(remaining.values()):
        raise ValueError(f"{where} names more pictures than its text has places for")
    return ordered


def parse_instruction(row, context, answer):
    """{"instruction": text, context: text, answer: text} → Conversation of two turns.

    The context, if there is one, stands below the instruction. LLaMA-Factory's "history" of earlier
    turns, [[question, answer], …], comes before both.
    """
    text = require_type(str, row["instruction"], "instruction")
    if row.get(context) is not None and require_type(str, row[context], context).strip():
        text = f"{text}\n{row[context]}"
    turns = [*(row.get("history") or []), [text, require_type(str, row[answer], answer)]]
    messages = []
    for turn in require_type(list, turns, "history"):
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError(f"history has {json.dumps(turn)[:40]}, not [question, answer]")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return parse_conversation(row | {"messages": messages}, "messages")


# ---- one row -------------------------------------------------------------------------------------


class Format(NamedTuple):
    name: str
    keys: tuple[str, ...]  # a row with all of these keys is of this format
    parse: Callable  # its table → Captioned | Document | Conversation


FORMATS = (
    Format("MMC4", ("text_list", "image_info"), parse_mmc4),
    Format("OBELICS", ("images", "texts"), parse_obelics),
    Format("LLaVA", ("conversations",), partial(parse_conversation, key="conversations")),
    Format("ShareGPT", ("items",), partial(parse_conversation, key="items")),
    Format("messages", ("messages",), partial(parse_conversation, key="messages")),
    Format("Alpaca", ("instruction", "output"), partial(parse_instruction, context="input", answer="output")),
    Format("Dolly", ("instruction", "response"), partial(parse_instruction, context="context", answer="response")),
    Format("captions", ("image", "caption"), parse_captions),
    Format("captions", ("image", "text"), partial(parse_captions, caption="text")),
    Format("captions", ("image", "captions"), partial(parse_captions, caption="captions")),
    Format("captions", ("file", "caption"), partial(parse_captions, image="file")),
    Format("captions", ("file_name", "text"), partial(parse_captions, image="file_name", caption="text")),
    Format("captions", ("file_name", "caption"), partial(parse_captions, image="file_name")),
)

ELSEWHERE = {  # keys of rows that are known, and not of use here → what to do with them
    ("images", "annotations"): "COCO's table: write a row {image: a file_name, caption: …} for each of its annotations",
    ("chosen", "rejected"): "a preference: there is no training on preferences here",
    ("tokens",): "a row of tokens, as an LVM or a LLaMA reads it: name the file in data.rows",
    ("input_ids",): "a row of another tokenizer's ids: rows of texts are wanted",
    ("question", "answer"): 'a question: write {"conversations": …, "image": …}, <image> in the question',
    ("url", "caption"): "a link to a picture: download them (img2dataset), and name its shards",
    ("URL", "TEXT"): "a link to a picture: download them (img2dataset), and name its shards",
    ("text",): 'a text alone, which a LLaMA learns from: kind = "text", python prepare.py tokenize',
}


def read_row(raw):
    """The bytes of a row → (the name of its format, Captioned | Document | Conversation).

    A ValueError says what is wrong with it.
    """
    try:
        row = parse_json(raw)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, not a table {{…}}")
    for name, keys, parse in FORMATS:
        if all(key in row for key in keys):
            return name, parse(row)
    for keys, what in ELSEWHERE.items():
        if all(key in row for key in keys):
            raise ValueError(f"its keys {', '.join(keys)} are of {what}")
    for key, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            raise ValueError(f'a table around {len(value)} rows: write its list "{key}" into a file of its own')
    if row and set(map(type, row.values())) == {dict}:
        raise ValueError(f"a table of {len(row)} rows by their names: write its values alone")
    first = {format.name: format for format in reversed(FORMATS)}  # one of several with the same name
    known = "; ".join(f"{', '.join(first[name].keys)} ({name})" for name in reversed(first))
    raise ValueError(f"its keys {', '.join(row)[:200] or '(none)'} are of no known row: {known}")
