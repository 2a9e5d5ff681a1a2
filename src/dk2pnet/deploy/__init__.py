"""A network on its way to where it runs: ONNX export, parity with PyTorch, latency."""
