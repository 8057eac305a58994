"""A model behind an OpenAI-compatible endpoint, through the package `openai`."""

import hashlib
import json
import os
import random
from threading import Event
from typing import Any

from hbat.config.evaluation import JudgeConfig

_FIRST_WAIT = 0.5  # seconds
_LONGEST_WAIT = 60.0
#: Statuses that may go away, beside those of 500 and above.
_AGAIN = {408, 409, 429}
_SERVER = 500


class JudgeError(ConnectionError):
    """A judge that does not answer, or refuses to. Answers that came before are on disk."""


class Endpoint:
    """Asks one question at a time, from any thread.

    Raises:
        ImportError: If `openai` is missing.
        ValueError: If the environment has no key for OpenAI.
    """

    def __init__(self, config: JudgeConfig) -> None:
        try:
            import openai  # noqa: PLC0415 - an optional extra
        except ImportError as error:
            raise ImportError(
                "`judge.model` requires openai. Install it with `pip install 'hbat-trl[eval]'`."
            ) from error
        self._config, self._openai = config, openai
        name = config.api_key_env or ("OPENAI_API_KEY" if config.base_url is None else None)
        self._key = os.environ.get(name, "") if name else "none"
        if not self._key:
            raise ValueError(
                f"The environment has no {name}, with the key for `judge`. Set it, or the `base_url` of another "
                "endpoint."
            )
        # Repeated here: the package gives up on bodies that it cannot read.
        self._client: Any = openai.OpenAI(
            api_key=self._key, base_url=config.base_url, timeout=config.timeout, max_retries=0
        )

    def key_of(self, question: str) -> str:
        """Checksum of a question and of who answers it, at whatever address."""
        asked = [self._config.model, self._config.options, question]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def ask(self, question: str, stop: Event) -> dict[str, Any]:
        """Ask a question; `stop` ends the waiting between its repetitions.

        Returns:
            `answer` and `tokens`, or an `error` after `max_retries`.

        Raises:
            JudgeError: If the endpoint refuses the request itself: wrong key, model or address.
        """
        problem, wait = "stopped", 0.0
        for attempt in range(self._config.max_retries + 1):
            if stop.wait(wait):
                break
            wait = min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT) * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
            try:
                found = self._client.chat.completions.create(
                    model=self._config.model,
                    messages=[{"role": "user", "content": question}],
                    extra_body=self._config.options,
                )
            except self._openai.APIStatusError as error:
                problem = f"status {error.status_code}"
                if error.status_code not in _AGAIN and error.status_code < _SERVER:
                    raise JudgeError(self._refused(error)) from None  # the chain would show the request
                wait = _asked_to_wait(error) or wait
            except (self._openai.APIError, ValueError) as error:  # no connection, or a body that is no JSON
                problem = type(error).__name__
            else:
                if (row := _row(found)) is not None:
                    return row
                problem = "an answer in another schema"
        return {"error": problem}

    def _refused(self, error: Any) -> str:
        said = " ".join(str(error).split()).replace(self._key, "***")[:300]
        return (
            f"`judge`: {self._config.base_url or 'OpenAI'} refuses the request with status {error.status_code}: "
            f"{said}. Check `judge.model`, `judge.base_url`, and the key in the variable of `judge.api_key_env` "
            "(OPENAI_API_KEY for OpenAI)."
        )


def _row(found: Any) -> dict[str, Any] | None:
    try:
        answer = found.choices[0].message.content or ""
        return {"answer": str(answer), "tokens": int(getattr(found.usage, "total_tokens", 0) or 0)}
    except (AttributeError, IndexError, TypeError):
        return None


def _asked_to_wait(error: Any) -> float:
    try:
        return min(max(float(error.response.headers.get("retry-after", 0)), 0.0), _LONGEST_WAIT)
    except ValueError:  # a date
        return 0.0
