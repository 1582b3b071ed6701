"""The text of --text as a condition."""

from torch import Tensor

from models.command_line import UsageError
from models.config import TrainConfig
from models.sampling.options import SampleConfig
from models.text import load_text_encoder


def text_condition(options: SampleConfig, config: TrainConfig) -> dict[str, Tensor]:
    """{"text": (num_clips, L, W)} for a network that takes text, else nothing.

    Raises UsageError where such a network is given none, and as load_text_encoder.
    """
    if "text" not in config.network_config.conditions:
        return {}
    if options.text is None:
        raise UsageError(f'this network ({config.network}) takes a text: give --text, "" for none in particular')
    if not options.text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in options.text):
        raise UsageError(f"--text is not UTF-8: {options.text!r}")
    if config.data.text is None:
        raise UsageError("the configuration does not say what encodes the text: data.text is missing")
    return {"text": load_text_encoder(config.data.text).encode([options.text]).expand(options.num_clips, -1, -1)}
