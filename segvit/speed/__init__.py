"""How fast a model runs on this machine, where the time goes, and what would make it faster."""
