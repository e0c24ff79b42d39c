"""The method without any model: rules that reduce tokens, and which patch each token is."""
