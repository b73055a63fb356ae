"""What runs on each rank: the only package that imports torch and megatron."""
