"""The weights at a stage's start: anchor of the penalty and reference policy of DPO, in one set of tensors."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hbat.config.ewc import AnchorDevice
from hbat.engines.sharded import part_of, shared_as
from hbat.ewc.parameters import canonical_name, snapshot, trainable_parameters
from hbat.model.adapters import REFERENCE_ADAPTER, add_reference_adapter, match_reference_adapter, reference_parameters
from hbat.model.copies import frozen_copy


class StageStart:
    """Holds the weights at the start of the stage under way.

    A full model with a preference objective needs a second model as reference policy anyway: its parameters are the
    anchor of every stage. Otherwise the anchor is a copy of the trainable weights, which with LoRA is small, and in a
    preference stage the host's reference adapter takes its place.

    Args:
        model: The model.
        needs_reference: Whether an objective of the run takes a reference policy.
        shard: Shards a model in place, where the engine does. Nothing can be copied or added afterwards: the reference
            policy, or the reference adapter, is there from then on and sharded like the model.
        anchor_device: `model`, or `cpu` for an anchor in the main memory where it is no reference policy's.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        needs_reference: bool,
        shard: Callable[[nn.Module], None] | None = None,
        anchor_device: AnchorDevice = "model",
    ) -> None:
        self._model = model
        self._offloads = anchor_device == "cpu"
        self.reference: Any = None
        self._anchor: dict[str, Tensor] = {}
        self._shares_adapter = False
        if needs_reference and not hasattr(model, "peft_config"):
            self.reference = frozen_copy(model)
        if shard is not None:
            if needs_reference and self.reference is None:
                add_reference_adapter(model)
            shard(model)
            if self.reference is not None:
                shard(self.reference)
        if self.reference is not None:
            own = {canonical_name(name): each for name, each in self.reference.named_parameters()}
            self._anchor = {name: own[name] for name in trainable_parameters(model)}

    @property
    def anchor(self) -> Mapping[str, Tensor]:
        """Weights at the stage's start by parameter name, of the parameters' own dtype."""
        return self._anchor

    @torch.no_grad()
    def take(self, weights: Mapping[str, Tensor] | None = None) -> None:
        """Make `weights` the stage's start.

        Args:
            weights: Trainable weights by name; the model's present ones where left out.
        """
        current = trainable_parameters(self._model)
        if self.reference is None and (self._shares_adapter or not self._is_beside(current)):
            self._anchor = snapshot(current)
            self._shares_adapter = False
        for name, each in self._anchor.items():
            each.copy_(current[name] if weights is None else shared_as(weights[name], each))

    def _is_beside(self, parameters: Mapping[str, Tensor]) -> bool:
        # The first trainer moves the model to its device; on a quantised base TRL's cast the adapter to bfloat16.
        return self._anchor.keys() == parameters.keys() and all(
            each.dtype == parameters[name].dtype and (self._offloads or each.device == parameters[name].device)
            for name, each in self._anchor.items()
        )

    def set_aside(self) -> None:
        """Unused."""

    def complete_adapter(self) -> None:
        """Make the host's new reference adapter compute what the adapter computes."""
        if REFERENCE_ADAPTER in getattr(self._model, "peft_config", {}):
            match_reference_adapter(self._model)

    @torch.no_grad()
    def share_adapter(self) -> None:
        """Let the host's reference adapter be the anchor, where it made one that equals it."""
        if REFERENCE_ADAPTER not in getattr(self._model, "peft_config", {}):
            return
        copies = reference_parameters(self._model, self._anchor)
        if all(
            torch.equal(part_of(copies[name]), part_of(each).to(copies[name].device))
            and copies[name].dtype == each.dtype
            for name, each in self._anchor.items()
        ):
            self._anchor = copies
            self._shares_adapter = True

    @torch.no_grad()
    def set_reference(self, weights: Mapping[str, Tensor]) -> None:
        """Give the reference policy other weights, for an evaluation outside a stage.

        Args:
            weights: Trainable weights by name.
        """
        if self.reference is not None:
            self.take(weights)
        elif REFERENCE_ADAPTER in getattr(self._model, "peft_config", {}):
            for name, each in reference_parameters(self._model, self._anchor).items():
                each.copy_(shared_as(weights[name], each))
