"""What models cost: multiply-accumulates, layer by layer, tokens, and what fits a budget."""
