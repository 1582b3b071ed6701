"""A CLIP of two layers with random weights: single letters are its words."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

LENGTH, WIDTH, SIDE = 12, 32, 28
WORDS = {"a</w>": 2, "b</w>": 3, "c</w>": 4, "a": 5, "b": 6, "c": 7}


def save_tiny_clip(folder: Path) -> Path:
    """Write the model and its tokenizer to `folder`, and return it."""
    shared = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(**shared, vocab_size=8, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=1)
    vision = CLIPVisionConfig(**shared, image_size=SIDE, patch_size=14)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).save_pretrained(folder)
    CLIPTokenizer({"<|startoftext|>": 0, "<|endoftext|>": 1, **WORDS}, []).save_pretrained(folder)
    return folder
