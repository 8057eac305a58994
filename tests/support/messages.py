"""Messages of conversations."""


def user(text="Why is the sky blue?"):
    return {"role": "user", "content": text}


def assistant(text="It scatters blue light."):
    return {"role": "assistant", "content": text}


CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "look"}}]}


TOOL = {"role": "tool", "name": "look", "content": ""}


IMAGE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
