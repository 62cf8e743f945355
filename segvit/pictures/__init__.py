"""Pictures for people: overlays, legends, heat maps, charts and HTML pages; of arrays alone."""
