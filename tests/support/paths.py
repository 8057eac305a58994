"""The path integral of a plain trainer, from its definition."""

import cases
import oracle
import torch
from transformers import TrainerCallback


class Witness(TrainerCallback):
    """Adds up -g * step in float64: autograd's gradients of the task's losses, and the changes of the weights."""

    def __init__(self):
        self.path = {}

    def see(self, loss, parameters):
        """Take the gradients of one micro-batch's loss, with its share of the step."""
        found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        for name, gradient in zip(parameters, found, strict=True):
            self.gradient[name] = self.gradient.get(name, 0.0) + oracle.array(gradient)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.gradient, self.before = {}, oracle.arrays(cases.trainable(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        after = oracle.arrays(cases.trainable(model))
        for name, gradient in self.gradient.items():
            self.path[name] = self.path.get(name, 0.0) - gradient * (after[name] - self.before[name])
