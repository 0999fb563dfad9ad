"""Parts of experiments/gpu.py: what works, how fast it is, what is learned; each line in a process of its own."""
