"""What is measured: operators and their peers, whole models, decoders, published counts."""
