"""Who moves when."""
