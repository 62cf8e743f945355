"""A model behind HTTP: reading of requests, batches, limits, counts, and a page to try it on."""
