"""Parts of experiments/chaos.py."""
