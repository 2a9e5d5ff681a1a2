"""dk2pnet."""
