"""The learning rate of every step."""

from segvit.options import TrainConfig


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Factor on every group's learning rate in `step`: linear warm-up, then (1 - t)^power."""
    warmup = min(config.warmup_steps, config.max_steps - 1)
    if step < warmup:
        first = min(1.0, config.warmup_lr / config.lr)
        return first + (1 - first) * step / warmup
    return (1 - (step - warmup) / (config.max_steps - warmup)) ** config.power
