"""Training and evaluation. Read `train.py` first, then `loop.py`: the others are what they name."""
