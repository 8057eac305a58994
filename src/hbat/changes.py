"""What changed between a run on disk and the one that shall go on, and what of it may change within a run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from hbat.manifest import RunStateError
from hbat.sections import nearest

#: Sections that are ours: compared key by key. All others are configurations of the host, whose fields come and go
#: from release to release.
_OWN_SECTIONS = {"run", "ewc", "data", "parameters", "tokenizer"}
#: Fields of the host's configurations that hold fields of the host themselves, and not what the user chose to pass on.
_HOST_SECTIONS = {"accelerator_config"}
#: What cannot change within a run, with the reason.
_FIXED = {
    "run.objectives": "the plan of the stages is made of them",
    "run.num_rounds": "the data sets are cut into that many parts",
    "run.seed": "it cuts the data sets into parts",
    "run.ppo_backend": "what PPO keeps between its stages is the trainer's own",
    "ewc": "the stages that are done have left importance, or none; `ewc.f_max: 0` switches the penalty off",
    "ewc.source": "the importance accumulated so far is of another kind",
    "ewc.granularity": "the importance accumulated so far is of another kind",
    "data.*.rows": "the parts of later rounds would hold rows of earlier ones",
    "data.*.columns": "the rows mean something else",
    "parameters.*": "the tensors on disk are not those of this model",
    "tokenizer.vocabulary": "the tokens mean something else",
}
_NOTES = {"run.processes": "another number of processes gives other results"}


@dataclass(frozen=True)
class Change:
    """A value that differs between two fingerprints.

    Attributes:
        name: Its dotted name.
        before: Its value on disk; None where there is none.
        now: Its present value; None where there is none.
    """

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
        """Whether a stage is trained otherwise by it.

        Args:
            objective: The stage's objective.
            others: The run's objectives.

        Returns:
            False if it is a value of another objective alone.
        """
        section, *rest = self.name.split(".")
        owner = rest[0] if section == "data" and rest else section
        return owner == objective or owner not in others


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """List what changed between two fingerprints.

    Of the host's configurations only fields that both have are compared, so that another release of the host, which
    adds fields or removes some, goes on with a run.

    Args:
        before: The one on disk.
        now: The present one.

    Returns:
        Changes by name.
    """
    return list(_changes(before, now, "", shared_only=False))


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str, *, shared_only: bool) -> Iterator[Change]:
    for key in sorted(before.keys() & now.keys() if shared_only else before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            of_host = key in _HOST_SECTIONS if prefix else key not in _OWN_SECTIONS
            yield from _changes(old, new, f"{prefix}{key}.", shared_only=of_host)
        elif old != new:
            yield Change(f"{prefix}{key}", old, new)


def accepted(
    before: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str], *, output_dir: str
) -> list[Change]:
    """Check that nothing changed but what may.

    Args:
        before: Fingerprint of the run on disk.
        now: The present one.
        allowed: Names that may change, or beginnings of names that end in a dot.
        output_dir: The run's folder, for messages.

    Returns:
        The changes that were allowed.

    Raises:
        RunStateError: If something else changed, something that cannot change, or a name is unknown.
    """
    found = changes(before, now)
    known = sorted({*_names(before), *_names(now), *(each.name for each in found)})
    for name in allowed:
        if name not in known:
            raise RunStateError(
                f"`allow_changed` names {name!r}, which is no value of this run.{nearest(name, known)}"
            )
    named = [each for each in found if any(_covers(name, each.name) for name in allowed)]
    refused = [each for each in found if each not in named or each.fixed]
    if not refused:
        return named
    message = f"`output_dir` {output_dir!r} holds another run: {'; '.join(map(str, refused))}."
    for each in refused:
        if each.fixed and each in named:
            message += f" `{each.name}` cannot change within a run: {each.fixed}."
    if possible := [each.name for each in refused if not each.fixed]:
        message += f" Values may change that `allow_changed` names, here {', '.join(possible)} (`--allow-changed`)."
    raise RunStateError(f"{message} Restore these values to go on with it, or choose another folder.")


def _covers(allowed: str, name: str) -> bool:
    return name.startswith(allowed) if allowed.endswith(".") else name == allowed


def _names(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield f"{prefix}{key}."
            yield from _names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
