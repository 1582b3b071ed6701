"""Text as a condition: the encoders, their cache on disk, and the dataset that adds embeddings to its samples."""

from models.text.dataset import TextDataset
from models.text.encoder import TextEncoder, load_text_encoder

__all__ = ["TextDataset", "TextEncoder", "load_text_encoder"]
