"""A run of training: its folder, checkpoints, log and results, and how it is stopped and continued."""
