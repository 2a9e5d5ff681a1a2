"""Networks that are ONNX graphs."""
