"""Faults in the turns of a conversation, given as messages or written out as "Human: ... Assistant: ..."."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hbat.config.fields import nearest

Turn = Mapping[str, Any]

#: A fault of a turn: index of the turn, key within it (or empty), kind of fault, and the problem in words.
TurnFault = tuple[int, str, str, str]

#: A template may know others; whether it does is seen when it is tried (`hbat.data.template`).
ROLES = ("system", "developer", "user", "assistant", "tool")
#: Never the roles of a chat template, unlike `observation` and others of `layouts.FOREIGN_ROLES`.
_FOREIGN_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}

_ROLE_OF = {"Human": "user", "User": "user", "Assistant": "assistant"}
_MARKERS = ("Human:", "Assistant:", "User:")
# `User:` alone on a line is a key of YAML, so a user's turn needs words after it.
_LEADING = re.compile(r"\s*(?:Human:|Assistant:|User:(?=[ \t]*\S))")
_GLUED = re.compile(r"(?<=\S)[ \t]{2,}(?:Human|Assistant|User):")
_OWN_LINE = re.compile(r"^(?:Human:|Assistant:|User:(?=[ \t]*\S))", re.MULTILINE)


def turn_faults(
    turns: Sequence[Any],
    *,
    first: Sequence[str] = (),
    last: Sequence[str] = (),
    keys: tuple[str, str] = ("role", "content"),
) -> Iterator[TurnFault]:
    """Find the faults of a conversation that may begin and end with the roles `first` and `last` (empty: any)."""
    role_key, content_key = keys
    previous = None
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            yield index, "", "not a message", f"{turn!r:.60} is not a message with `{role_key}` and `{content_key}`"
            return
        role = turn.get(role_key)
        yield from _role_faults(index, turn, role_key)
        if role == previous and role in ("user", "assistant"):
            yield index, role_key, "repeated role", f"two consecutive turns have the role {role!r}"
        if role == "tool" and turn.get(content_key) is None:
            problem = f"the message has no `{content_key}`; an empty tool result is an empty string"
            yield index, content_key, "message without content", problem
        elif role not in (None, "tool"):  # the result of a tool may be empty
            yield from _content_faults(index, turn, str(role), content_key)
        previous = role
    if first and turns[0].get(role_key) not in first:
        problem = f"the first turn must be from the {' or '.join(first)}; earlier turns belong in the prompt"
        yield 0, role_key, "wrong first turn", problem
    end = turns[-1].get(role_key)
    if last and end not in last and (end in (*ROLES, None) or "assistant" in last):
        yield len(turns) - 1, role_key, "wrong last turn", f"the last turn must be from the {' or '.join(last)}"


def _role_faults(index: int, turn: Turn, key: str) -> Iterator[TurnFault]:
    role = turn.get(key)
    if role is None:
        hint = "; rename `from` to `role` and `value` to `content`" if turn.get("from") else ""
        yield index, key, "message without role", f"the message has no `{key}`{hint}"
    elif role not in ROLES:
        known = _FOREIGN_ROLES.get(str(role).lower())
        hint = f" Did you mean `{known}`?" if known else nearest(str(role).lower(), ROLES)
        if hint or not isinstance(role, str) or not role.strip():
            yield index, key, "unknown role", f"the role {role!r} is not one of {', '.join(ROLES)}.{hint}"


def _content_faults(index: int, turn: Turn, role: str, key: str) -> Iterator[TurnFault]:
    content = turn.get(key)
    if not content and role == "assistant" and (turn.get("tool_calls") or turn.get("function_call")):
        return
    if content is None:
        yield index, key, "message without content", f"the message has no `{key}`"
    elif isinstance(content, str):
        if not content.strip():
            yield index, key, "empty turn", "the content is empty"
        elif marker := turn_marker(content, role):
            yield index, key, "role marker", marker
    elif not isinstance(content, list | tuple) or not all(isinstance(block, Mapping) for block in content):
        yield index, key, "not text", f"{content!r:.60} is neither a string nor a list of content blocks"
    elif all(block.get("type") == "text" and not str(block.get("text") or "").strip() for block in content):
        yield index, key, "empty turn", "the content is empty"


def turn_marker(text: str, role: str) -> str | None:
    """Describe the start of another turn inside the text of one, as wrongly split transcripts leave it."""
    if not any(marker in text for marker in _MARKERS):
        return None
    # A user may quote a conversation, so the beginning of a line counts only in an assistant's text.
    found = _LEADING.match(text) or _GLUED.search(text) or (_OWN_LINE.search(text) if role == "assistant" else None)
    if found is None:
        return None
    quote = " ".join(text[found.start() :].split())
    return f"the text contains the role marker of another turn: {quote[:40]!r}"


def text_turns(text: str) -> list[dict[str, Any]]:
    """Split a text that begins with "Human:" and has "Assistant:" on a later line into messages; else return none."""
    if "\nAssistant:" not in text or not text.lstrip().startswith(("Human:", "User:")):
        return []
    # Where blank lines separate the turns, a marker after a single line break belongs to the turn.
    separator = "\n\n" if "\n\nAssistant:" in text else "\n"
    pieces = re.split(rf"{separator}(Human|Assistant|User):", separator + text.lstrip())
    return [
        {"role": _ROLE_OF[marker], "content": content.strip()}
        for marker, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def answer_start(turns: Sequence[Turn]) -> int:
    """Return the index where the answer of a conversation begins: its last turn, with the tool calls before it."""
    start = len(turns) - 1
    while start > 0 and (turns[start - 1].get("role") == "tool" or turns[start - 1].get("tool_calls")):
        start -= 1
    return start
