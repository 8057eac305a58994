"""What differs between the run on disk and the present one, and what of it may."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from hbat.config.fields import nearest
from hbat.state.fingerprint import Fingerprint
from hbat.state.manifest import RunStateError

#: Our own sections, compared key by key. All others are configurations of TRL and transformers, of which only fields
#: that both sides have are compared, so that a run can be resumed with a release that adds or removes some.
_OWN_SECTIONS = {"run", "ewc", "data", "parameters", "tokenizer"}
#: A field of these configurations that itself holds fields of transformers, not what the user chose to pass on.
_NESTED = {"accelerator_config"}

#: What cannot change within a run, with the reason.
_FIXED = {
    "run.objectives": "the plan of the stages is made of them",
    "run.num_rounds": "the data sets are cut into that many parts",
    "run.rounds": "the data sets are cut into these parts",
    "run.trainers*": "what an objective keeps between its stages belongs to its trainer",
    "run.seed": "it cuts the data sets into parts",
    "run.continue_from": "it has begun, with or without what another run left",
    "run.ppo_backend": "what PPO keeps between its stages belongs to its trainer",
    "ewc": "the finished stages have left importance, or none; `ewc.strength: 0` switches the penalty off",
    "ewc.source": "the importance accumulated so far is of another kind",
    "ewc.granularity": "the importance accumulated so far is of another kind",
    "data.*.rows": "the parts of later rounds would hold rows of earlier ones",
    "data.*.columns": "the rows mean something else",
    "parameters.*": "the tensors on disk are not those of this model",
    "tokenizer.vocabulary": "the tokens mean something else",
}
#: What must be as in a run that is continued.
_CONTINUED = ("ewc.source", "ewc.granularity", "parameters.*", "tokenizer.vocabulary", "run.ppo_backend")
_NOTES = {"run.processes": "another number of processes gives other results"}


@dataclass(frozen=True)
class Change:
    """A value that differs between two fingerprints, by its dotted name; None if one of them lacks it."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        note = f" ({_NOTES[self.name]})" if self.name in _NOTES else ""
        return f"{self.name}: {self.before!r} -> {self.now!r}{note}"

    @property
    def fixed(self) -> str | None:
        """Why it cannot change within a run; None if it may."""
        return next((why for pattern, why in _FIXED.items() if fnmatchcase(self.name, pattern)), None)

    def concerns(self, objective: str, others: Sequence[str]) -> bool:
        """Whether it changes how a stage of `objective` trains, that is, belongs to no other objective alone."""
        section, *rest = self.name.split(".")
        owner = rest[0] if section == "data" and rest else section
        return owner == objective or owner not in others


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """List by name what differs between the values of two fingerprints."""
    return list(_changes(before, now, "", shared_only=False))


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str, *, shared_only: bool) -> Iterator[Change]:
    for key in sorted(before.keys() & now.keys() if shared_only else before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            of_libraries = key in _NESTED if prefix else key not in _OWN_SECTIONS
            yield from _changes(old, new, f"{prefix}{key}.", shared_only=of_libraries)
        elif old != new:
            yield Change(f"{prefix}{key}", old, new)


def hindrances(before: Fingerprint, now: Fingerprint) -> list[str]:
    """What keeps one run from being continued by another, each with the reason."""
    found = changes(before.values, now.values)
    return [f"{change}: {change.fixed}" for change in found if any(map(partial(fnmatchcase, change.name), _CONTINUED))]


def accepted(before: Fingerprint, now: Fingerprint, allowed: Sequence[str], *, output_dir: str) -> list[Change]:
    """Check that nothing changed but what is `allowed`: names, or beginnings of names that end in a dot.

    Returns:
        The changes that were allowed.

    Raises:
        RunStateError: If anything else changed, something that cannot change, or a name is unknown.
    """
    found = changes(before.values, now.values)
    known = sorted({*_names(before.values), *_names(now.values), *(change.name for change in found)})
    for name in allowed:
        if name not in known:
            raise RunStateError(
                f"`allow_changed` names {name!r}, which is not a setting of this run.{nearest(name, known)}"
            )
    named = [change for change in found if any(_covers(name, change.name) for name in allowed)]
    refused = [change for change in found if change not in named or change.fixed]
    if not refused:
        return named
    moved = []
    if before.versions != now.versions:
        moved = [change for change in refused if not change.fixed and _is_default(change, before, now)]
    messages = []
    if others := [change for change in refused if change not in moved]:
        messages.append(_other_run(others, named, output_dir))
    if moved:
        messages.append(_moved_defaults(moved, before, now, output_dir))
    raise RunStateError(" ".join(messages))


def _is_default(change: Change, *fingerprints: Fingerprint) -> bool:
    section, *field = change.name.split(".")[:2]
    return bool(field) and all(field[0] not in described.given.get(section, field) for described in fingerprints)


def _other_run(refused: Sequence[Change], named: Sequence[Change], output_dir: str) -> str:
    message = f"`output_dir` {output_dir!r} holds another run: {'; '.join(map(str, refused))}."
    for change in refused:
        if change.fixed and change in named:
            message += f" `{change.name}` cannot change within a run: {change.fixed}."
    if possible := [change.name for change in refused if not change.fixed]:
        message += f" Values may change that `allow_changed` names, here {', '.join(possible)} (`--allow-changed`)."
    return f"{message} Restore these values to resume it, or choose another folder."


def _moved_defaults(moved: Sequence[Change], before: Fingerprint, now: Fingerprint, output_dir: str) -> str:
    versions = [
        f"{name} {before.versions.get(name, 'none')} -> {now.versions.get(name, 'none')}"
        for name in sorted(before.versions.keys() | now.versions.keys())
        if before.versions.get(name) != now.versions.get(name)
    ]
    names = ",".join(change.name for change in moved)
    return (
        f"Defaults have changed since the run in `output_dir` {output_dir!r} was saved ({', '.join(versions)}): "
        f"{'; '.join(map(str, moved))}. Set the old values explicitly to keep them, or accept the new ones with "
        f"`allow_changed` (`--allow-changed {names}`)."
    )


def _covers(allowed: str, name: str) -> bool:
    return name.startswith(allowed) if allowed.endswith(".") else name == allowed


def _names(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield f"{prefix}{key}."
            yield from _names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
