"""The mathematics once more, slow and obvious, in float64. Shares no code with the library."""

import itertools
import math

import numpy as np
import torch


def array(value):
    """Any tensor, number or array as a float64 array."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


def arrays(mapping):
    return {name: array(each) for name, each in mapping.items()}


# --- penalty ---------------------------------------------------------------------------------------------------------


def penalty(parameters, anchor, importance, strength=1.0):
    """strength * sum_k sum_i F_ki (theta_ki - anchor_ki)^2, element by element."""
    total = 0.0
    for name in parameters:
        theta, start = array(parameters[name]), array(anchor[name])
        weight = np.broadcast_to(array(importance[name]), theta.shape)
        for index in np.ndindex(theta.shape):
            total += strength * weight[index] * (theta[index] - start[index]) ** 2
    return total


def penalty_gradient(parameters, anchor, importance, strength=1.0):
    """Its derivative in every element: 2 strength F (theta - anchor)."""
    return {
        name: 2.0 * strength * array(importance[name]) * (array(parameters[name]) - array(anchor[name]))
        for name in parameters
    }


def proximal(parameters, anchor, importance, strength, learning_rates):
    """Minimiser of |x - theta|^2 / (2 eta) + c |x - anchor|^2, found by setting the derivative in x to zero."""
    result = arrays(parameters)
    for name, rate in learning_rates.items():
        pull = 2.0 * rate * strength * array(importance[name])
        result[name] = (array(parameters[name]) + pull * array(anchor[name])) / (1.0 + pull)
    return result


def norm(mapping):
    """2-norm over all the tensors of a mapping."""
    return math.sqrt(sum(float((array(each) ** 2).sum()) for each in mapping.values()))


def inner(first, second):
    return sum(float((array(first[name]) * array(second[name])).sum()) for name in first)


def drift(parameters, anchor):
    """Root mean square of the difference over all elements."""
    squares = [(array(parameters[name]) - array(anchor[name])).ravel() ** 2 for name in parameters]
    return math.sqrt(np.concatenate(squares).mean())


# --- importance ------------------------------------------------------------------------------------------------------


def displacement(end, start, granularity):
    squares = {name: (array(end[name]) - array(start[name])) ** 2 for name in end}
    return squares if granularity == "element" else {name: each.mean() for name, each in squares.items()}


def normalize(raw, normalization, scale=1.0):
    raw = arrays(raw)
    entries = np.concatenate([each.ravel() for each in raw.values()])
    if normalization == "mean":
        return {name: each / (len(raw) * entries.mean()) for name, each in raw.items()}
    if normalization == "max":
        return {name: each / entries.max() for name, each in raw.items()}
    exponents = {name: (scale**2) * float(each) for name, each in raw.items()}
    largest = max(exponents.values())
    weights = {name: math.exp(each - largest) for name, each in exponents.items()}
    return {name: each / sum(weights.values()) for name, each in weights.items()}


def relative_importance(moved, path=None, damping=1.0):
    """max(0, w_i) / (A_i + damping * mean of A over the tensor), with w = 1 without a path; 0 for a divisor of 0."""
    result = {}
    for name, squared in arrays(moved).items():
        result[name] = np.zeros(squared.shape)
        for index in np.ndindex(squared.shape):
            worth = 1.0 if path is None else max(0.0, array(path[name])[index])
            divisor = squared[index] + damping * squared.mean()
            result[name][index] = worth / divisor if divisor > 0 else 0.0
    return result


def elements(value, size):
    """One number for each of the elements of a tensor; a value of the whole tensor counts for each of them."""
    return np.broadcast_to(array(value).ravel(), size).tolist()


def weighted_sum(weights, values, sizes):
    """sum_i F_i d_i over all elements."""
    return math.fsum(
        one * other
        for name, size in sizes.items()
        for one, other in zip(elements(weights[name], size), elements(values[name], size), strict=True)
    )


def normalize_to_stage(raw, moved, sizes):
    """F = raw / sum_i raw_i A_i; zero where that divides by zero."""
    total = weighted_sum(raw, moved, sizes)
    return {name: array(each) / total if total > 0 else 0.0 * array(each) for name, each in raw.items()}


def raw_importance(record, source, damping):
    """Importance from what an objective has left: its displacement, and its path integral or Fisher information."""
    moved = record["displacement"]
    return {
        "path": lambda: relative_importance(moved, record["importance"], damping),
        "relative": lambda: relative_importance(moved, None, damping),
        "displacement": lambda: arrays(moved),
        "fisher": lambda: arrays(record["importance"]),
        "uniform": lambda: {name: np.ones(array(each).shape) for name, each in moved.items()},
    }[source]()


def held_by(records, source, damping, sizes):
    """Importance for a stage: what each other objective has left in the unit of a stage, then summed."""
    each = [normalize_to_stage(raw_importance(one, source, damping), one["displacement"], sizes) for one in records]
    return {name: sum(one[name] for one in each) for name in sizes}


def predicted(record, moved, damping, sizes):
    """How much a stage raises an objective's loss: all that its path gained, times the share that it undoes."""
    path = record["importance"]
    gain = math.fsum(one for name, size in sizes.items() for one in elements(path[name], size))
    return max(gain, 0.0) * weighted_sum(held_by([record], "path", damping, sizes), moved, sizes)


def effective_tensors(importance):
    means = [array(each).mean() for each in importance.values()]
    shares = [each / sum(means) for each in means]
    return 1.0 / sum(each**2 for each in shares)


# --- Fisher ----------------------------------------------------------------------------------------------------------


def _trainable(model):
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def _target_log_probs(model, ids, labels):
    """(position of the label, log-probabilities there) for every target of one sequence, without any padding."""
    logits = model(input_ids=torch.tensor([list(ids)])).logits[0]
    for position in range(1, len(ids)):
        if labels[position] != -100:
            yield position, torch.log_softmax(logits[position - 1], dim=-1)


def _gradient(scalar, parameters):
    found = torch.autograd.grad(scalar, list(parameters.values()), retain_graph=True, allow_unused=True)
    return {
        name: np.zeros(tuple(each.shape)) if gradient is None else array(gradient)
        for (name, each), gradient in zip(parameters.items(), found, strict=True)
    }


def exact_fisher(model, examples):
    """True diagonal Fisher, a mean over sequences: every label of every target position is enumerated.

    Labels of different positions are independent given the data's own prefix and their scores have mean zero, so the
    second moment of the sum is the sum of second moments.
    """
    parameters = _trainable(model)
    total = {name: np.zeros(tuple(each.shape)) for name, each in parameters.items()}
    for ids, labels in examples:
        for _, log_probs in _target_log_probs(model, ids, labels):
            for token in range(log_probs.numel()):
                score = _gradient(log_probs[token], parameters)
                for name, each in score.items():
                    total[name] += math.exp(log_probs[token].detach()) * each**2
    return {name: each / len(examples) for name, each in total.items()}


def empirical_fisher(model, examples):
    """Mean over sequences of the squared gradient of the log-likelihood of the data's own targets."""
    parameters = _trainable(model)
    total = {name: np.zeros(tuple(each.shape)) for name, each in parameters.items()}
    for ids, labels in examples:
        log_likelihood = sum(each[labels[at]] for at, each in _target_log_probs(model, ids, labels))
        for name, each in _gradient(log_likelihood, parameters).items():
            total[name] += each**2
    return {name: each / len(examples) for name, each in total.items()}


# --- plan of a run ---------------------------------------------------------------------------------------------------


def stages(num_rounds, objectives):
    """(index, round, objective) of every stage in order."""
    return [(index, *each) for index, each in enumerate(itertools.product(range(num_rounds), objectives))]


# --- PPO: one list of floats a completion, without padding -----------------------------------------------------------


def ragged(padded, lengths):
    """The first elements of each row as lists of floats."""
    return [[float(each) for each in row[:length]] for row, length in zip(padded.tolist(), lengths, strict=True)]


def token_rewards(scores, kl, kl_coef):
    """The score falls on the last token, the KL penalty on each."""
    return [
        [-kl_coef * each + (score if at == len(row) - 1 else 0.0) for at, each in enumerate(row)]
        for score, row in zip(scores, kl, strict=True)
    ]


def variance(values):
    mean = math.fsum(values) / len(values)
    return math.fsum((each - mean) ** 2 for each in values) / (len(values) - 1)


def whiten(rows, *, shift_mean):
    everything = [each for row in rows for each in row]
    mean = math.fsum(everything) / len(everything)
    deviation = math.sqrt(variance(everything) + 1e-8)
    return [[(each - mean) / deviation + (0.0 if shift_mean else mean) for each in row] for row in rows]


def temporal_differences(rewards, values, gamma):
    """r_t + gamma V_{t+1} - V_t of one completion, with V = 0 beyond its end."""
    ahead = [*values[1:], 0.0]
    return [r + gamma * following - v for r, v, following in zip(rewards, values, ahead, strict=True)]


def advantages(rewards, values, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l}, summed up for every t anew."""
    deltas = temporal_differences(rewards, values, gamma)
    return [
        math.fsum((gamma * lam) ** (later - at) * deltas[later] for later in range(at, len(deltas)))
        for at in range(len(deltas))
    ]


def discounted(rewards, gamma):
    return [
        math.fsum(gamma ** (later - at) * rewards[later] for later in range(at, len(rewards)))
        for at in range(len(rewards))
    ]


def kl_term(log_prob, reference, estimator):
    ratio = math.exp(reference - log_prob)
    return -math.log(ratio) if estimator == "k1" else ratio - 1.0 - math.log(ratio)


def policy_loss(log_prob, old_log_prob, advantage, clip_range):
    """-min(ratio A, clipped ratio A)."""
    ratio = math.exp(log_prob - old_log_prob)
    clipped = min(max(ratio, 1.0 - clip_range), 1.0 + clip_range)
    return -min(ratio * advantage, clipped * advantage)


def policy_loss_slope(log_prob, old_log_prob, advantage, clip_range):
    """Its derivative in log_prob: none where the ratio has left the range to the side that the advantage favours."""
    ratio = math.exp(log_prob - old_log_prob)
    done = ratio > 1.0 + clip_range if advantage > 0 else ratio < 1.0 - clip_range
    return 0.0 if done else -advantage * ratio


def value_loss(value, old_value, target, clip_range):
    clipped = old_value + min(max(value - old_value, -clip_range), clip_range)
    return max((value - target) ** 2, (clipped - target) ** 2) / 2.0


def distribution(logits, temperature=1.0):
    """Probabilities from a list of logits."""
    highest = max(logits)
    weights = [math.exp((each - highest) / temperature) for each in logits]
    return [each / math.fsum(weights) for each in weights]


def log_prob(logits, token, temperature=1.0):
    highest = max(logits)
    norm = math.log(math.fsum(math.exp((each - highest) / temperature) for each in logits))
    return (logits[token] - highest) / temperature - norm


def entropy(logits, temperature=1.0):
    return -math.fsum(each * math.log(each) for each in distribution(logits, temperature) if each > 0.0)
