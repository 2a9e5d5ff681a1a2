"""One page for each verb."""
