"""What the configurations of all networks share."""

from collections.abc import Iterable


class ClipConfig:
    """The base of a network's frozen dataclass of sizes, which has the fields named here."""

    input_size: int | tuple[int, int]
    in_channels: int
    learn_sigma: bool

    @property
    def frame_size(self) -> tuple[int, int]:
        """(height, width) of a frame."""
        if isinstance(self.input_size, int):
            return self.input_size, self.input_size
        height, width = self.input_size
        return height, width

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return 2 * self.in_channels if self.learn_sigma else self.in_channels

    def refuse_unless(self, rules: Iterable[tuple[str, bool, str]]) -> None:
        """Raise ValueError for the first of the (field, whether it holds, what is wanted) that does not hold."""
        for name, holds, wanted in rules:
            if not holds:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
