"""EViT for PyTorch: vision transformers that keep the patches that matter and fuse the rest."""
