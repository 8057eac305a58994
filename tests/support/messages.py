"""Messages of conversations, and conversations written out as text."""


def user(text="Why is the sky blue?"):
    return {"role": "user", "content": text}


def assistant(text="It scatters blue light."):
    return {"role": "assistant", "content": text}


def dialogue(*texts):
    return "".join(f"\n\n{('Human', 'Assistant')[at % 2]}: {text}" for at, text in enumerate(texts))


SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "look"}}]}
TOOL = {"role": "tool", "name": "look", "content": ""}
IMAGE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
