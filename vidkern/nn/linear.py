"""Linear layers with the initialisation of DiT."""

from torch import nn


def xavier_linear(in_features: int, out_features: int) -> nn.Linear:
    """Return a Linear with Xavier's uniform weights and no bias to begin with."""
    linear = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """Return a Linear that gives 0 to begin with, as every gate and the output of adaLN-Zero do."""
    linear = nn.Linear(in_features, out_features)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
