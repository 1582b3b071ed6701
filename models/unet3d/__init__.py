"""The parts of a factorised 3D U-Net, whose clips are (B, F, H, W, C): a convolution's layout and attention's."""
