"""The questions of the EViT paper, answered by runs on this machine; `make study-page` writes the answers."""
