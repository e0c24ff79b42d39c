"""What real_weights.py and fine_tuning.py consist of: inputs, reductions, neighbours, heads, drift, pages."""
