"""The parts of sampling: a checkpoint's network, given frames, and pixels to and from the network's space."""
