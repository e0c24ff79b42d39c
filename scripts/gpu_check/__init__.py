"""The parts of scripts/gpu-check.py; standard library only."""
