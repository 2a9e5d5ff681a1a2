"""What compression asks of a CNN, and its two kinds."""
