"""The parts of a training run: processes, optimisation, checkpoints, metrics and data, one subject a file."""
