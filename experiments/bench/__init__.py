"""What experiments/benchmark.py measures: `timing`, its subjects, and the page that it writes."""
