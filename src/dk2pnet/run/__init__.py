"""The shell around any work."""
