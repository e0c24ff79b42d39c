"""The questions of the EViT paper, answered by runs on this machine; docs/study.md shows the answers."""
