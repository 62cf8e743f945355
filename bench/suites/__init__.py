"""One file a command: what it measures, in which order, into which result."""
