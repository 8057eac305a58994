import os

import pytest


@pytest.fixture
def fast_disk(monkeypatch):
    """Waiting for the disk takes most of the time of many states, and a test outlives no power cut."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
