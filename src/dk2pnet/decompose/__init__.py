"""Tensors in, tensors out: moments, solver, selection. Knows no `torch.nn.Module`."""
