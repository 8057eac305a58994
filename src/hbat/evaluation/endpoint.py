"""A model behind an OpenAI-compatible endpoint, through the package `openai`."""

import hashlib
import json
import os
import random
import time
from typing import Any

from hbat.config.evaluation import JudgeConfig

_FIRST_WAIT = 0.5  # seconds
_LONGEST_WAIT = 30.0
#: Statuses that may go away.
_AGAIN = {408, 409, 429}


class Endpoint:
    """Asks one question at a time, from any thread.

    Args:
        config: The judge's configuration.

    Raises:
        ImportError: If `openai` is missing.
    """

    def __init__(self, config: JudgeConfig) -> None:
        try:
            import openai  # noqa: PLC0415 - an optional extra
        except ImportError as error:
            raise ImportError(
                "`judge.model` requires openai. Install it with `pip install 'hbat-trl[eval]'`."
            ) from error
        self._config, self._openai = config, openai
        self._key = os.environ.get(config.api_key_env, "")
        # Repeated here: the package gives up on answers that were cut off.
        self._client: Any = openai.OpenAI(
            api_key=self._key or "none", base_url=config.base_url, timeout=config.timeout, max_retries=0
        )

    def key_of(self, question: str) -> str:
        """Checksum of a question and of who answers it, at whatever address."""
        asked = [self._config.model, self._config.options, question]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def ask(self, question: str) -> dict[str, Any]:
        """Ask a question.

        Returns:
            `answer` and `tokens`, or an `error` after `max_retries`.

        Raises:
            ValueError: If the endpoint refuses the request itself: wrong key, model or address.
        """
        problem = ""
        for attempt in range(self._config.max_retries + 1):
            if attempt:
                time.sleep(min(_FIRST_WAIT * 2 ** (attempt - 1), _LONGEST_WAIT) * random.uniform(0.5, 1.0))  # noqa: S311
            try:
                found = self._client.chat.completions.create(
                    model=self._config.model,
                    messages=[{"role": "user", "content": question}],
                    **self._config.options,
                )
                answer = found.choices[0].message.content
                return {"answer": str(answer or ""), "tokens": int(getattr(found.usage, "total_tokens", 0) or 0)}
            except self._openai.APIStatusError as error:
                problem = f"status {error.status_code}"
                if error.status_code not in _AGAIN and error.status_code < 500:  # noqa: PLR2004 - of the server
                    raise ValueError(self._refused(error)) from None  # the chain would show the request
            except Exception as error:  # noqa: BLE001 - a lost connection, or a body that is no answer
                problem = type(error).__name__
        return {"error": problem}

    def _refused(self, error: Any) -> str:
        said = " ".join(str(error).split()).replace(self._key or "\0", "***")[:300]
        return (
            f"`judge`: {self._config.base_url or 'OpenAI'} refuses the request with status {error.status_code}: "
            f"{said}. Check `judge.model`, `judge.base_url` and the key in {self._config.api_key_env}."
        )
