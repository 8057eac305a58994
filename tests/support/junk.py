"""Values that no option expects, and the form that an error about them must have."""

import functools

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

#: The same examples in every run.
fixed = functools.partial(
    settings, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)

JUNK = st.sampled_from([
    None, "", "x", True, -1, 0, 10**400, float("nan"), float("inf"), -0.5, [], {}, ["x"], {"x": 1}, b"x", "1e-3", "no",
])  # fmt: skip


def one_line(error, start=""):
    message = str(error)
    assert message.startswith(start)
    assert "\n" not in message
    assert len(message) < 2000
    return message
