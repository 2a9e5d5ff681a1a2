"""Networks that are PyTorch modules."""
