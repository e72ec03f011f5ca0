"""Learning rates over a training (Vaswani et al. 2017, section 5.3)."""

import math

from model.config import TrainingConfig


def peak_rate(config: TrainingConfig, d_model: int) -> float:
    """The rate at the end of the warm-up: configured, or the paper's (d_model * warmup)^-0.5."""
    return config.learning_rate if config.learning_rate is not None else (d_model * config.warmup) ** -0.5


def learning_rate(config: TrainingConfig, d_model: int, update: int) -> float:
    """The rate of one update.

    Linear up to `warmup`, then falling: with update^-0.5, or as half a cosine that reaches zero after the last update.

    Args:
        config: schedule, warm-up and length of the training.
        d_model: width of the model, for the paper's default rate.
        update: number of the update, from 1.
    """
    peak = peak_rate(config, d_model)
    if update <= config.warmup:
        return peak * update / config.warmup
    if config.schedule == "inverse-sqrt":
        return peak * math.sqrt(config.warmup / update)
    return peak * (1 + math.cos(math.pi * (update - config.warmup) / (config.updates + 1 - config.warmup))) / 2
