"""What real_weights.py consists of: downloads, weights, pictures, reductions, neighbours, drift, the page."""
