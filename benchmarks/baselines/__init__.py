"""The public code's arithmetic and layout in plain PyTorch: what vidkern is measured against."""
