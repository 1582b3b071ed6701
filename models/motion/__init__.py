"""Motion of a clip: optical flow from its first frame and what that frame shows, in every form that is used."""

from models.motion.forms import from_grid, from_network, to_grid, to_network
from models.motion.warp import warp

__all__ = ["from_grid", "from_network", "to_grid", "to_network", "warp"]
