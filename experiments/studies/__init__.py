"""What the studies share: cells that start from one LoRA, statistics over seeds and examples, and figures."""
