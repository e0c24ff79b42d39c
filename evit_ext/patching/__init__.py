"""The method inside other people's models: applying it, recording, full grids, oracles, model families."""
