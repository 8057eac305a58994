"""Takes the start of a stage: the anchor of the penalty and the reference policy, which are the same weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hbat.engines.engine import Engine
from hbat.engines.sharded import part_of, shared_as
from hbat.ewc.parameters import canonical_name, snapshot, trainable_parameters
from hbat.model.adapters import REFERENCE_ADAPTER, add_reference_adapter, match_reference_adapter, reference_parameters
from hbat.model.copies import frozen_copy


class StageStart:
    """Holds the weights at the start of the stage under way, once.

    A full model with a preference objective needs a second model as reference policy anyway: its parameters are the
    anchor of every stage. Otherwise the anchor is a copy of the trainable weights, which is small with LoRA, and in a
    preference stage the reference adapter takes its place.

    Args:
        model: The model. An engine that shards does so here: nothing can be copied or added afterwards.
        needs_reference: Whether an objective of the run takes a reference policy.
        engine: The engine of the run.
    """

    def __init__(self, model: nn.Module, *, needs_reference: bool, engine: Engine) -> None:
        self._model: Any = model
        self._has_adapter = hasattr(model, "peft_config")
        self.reference: Any = frozen_copy(model) if needs_reference and not self._has_adapter else None
        self._anchor: dict[str, Tensor] = {}
        self._shares_adapter = False
        if engine.shards and needs_reference and self._has_adapter:
            add_reference_adapter(model)
        engine.place(model, self.reference)
        if self.reference is not None:
            own = {canonical_name(name): parameter for name, parameter in self.reference.named_parameters()}
            self._anchor = {name: own[name] for name in trainable_parameters(model)}

    @property
    def anchor(self) -> Mapping[str, Tensor]:
        """Weights at the stage's start by parameter name, of the parameters' own dtype."""
        return self._anchor

    @torch.no_grad()
    def take(self, weights: Mapping[str, Tensor] | None = None) -> None:
        """Make `weights` the stage's start; by default the model's present trainable weights."""
        current = trainable_parameters(self._model)
        if self.reference is None and (self._shares_adapter or not self._matches(current)):
            self._anchor = snapshot(current)
            self._shares_adapter = False
        for name, anchor in self._anchor.items():
            anchor.copy_(current[name] if weights is None else shared_as(weights[name], anchor))

    def _matches(self, parameters: Mapping[str, Tensor]) -> bool:
        # The first trainer moves the model to its device.
        return self._anchor.keys() == parameters.keys() and all(
            anchor.dtype == parameters[name].dtype and anchor.device == parameters[name].device
            for name, anchor in self._anchor.items()
        )

    def complete_adapter(self) -> None:
        """Make the reference adapter compute what the adapter computes, now that a trainer was built on both."""
        if self._has_reference_adapter():
            match_reference_adapter(self._model)

    @torch.no_grad()
    def share_adapter(self) -> None:
        """Let the reference adapter be the anchor, where it equals it."""
        if not self._has_reference_adapter():
            return
        copies = reference_parameters(self._model, self._anchor)
        if copies.keys() == self._anchor.keys() and all(
            copies[name].dtype == anchor.dtype
            and torch.equal(part_of(copies[name]), part_of(anchor).to(copies[name].device))
            for name, anchor in self._anchor.items()
        ):
            self._anchor = copies
            self._shares_adapter = True

    @torch.no_grad()
    def set_reference(self, weights: Mapping[str, Tensor]) -> None:
        """Give the reference policy other trainable weights, for an evaluation outside a stage."""
        if self.reference is not None:
            self.take(weights)
        elif self._has_reference_adapter():
            for name, parameter in reference_parameters(self._model, self._anchor).items():
                parameter.copy_(shared_as(weights[name], parameter))

    @torch.no_grad()
    def interpolate(self, end_weight: float) -> None:
        """Move the model to `start + end_weight * (end - start)`."""
        if end_weight == 1.0:
            return
        for name, parameter in trainable_parameters(self._model).items():
            start = self._anchor[name].to(parameter.device).float()
            parameter.copy_(start + end_weight * (parameter.float() - start))

    def _has_reference_adapter(self) -> bool:
        return REFERENCE_ADAPTER in getattr(self._model, "peft_config", {})
