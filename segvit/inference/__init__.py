"""From images to label maps with any model that answers `segvit.inference.protocol`: passes, engine."""
