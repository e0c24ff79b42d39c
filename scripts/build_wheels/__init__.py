"""The parts of scripts/build-wheels.py."""
