"""Where networks run: one file for each runtime."""
