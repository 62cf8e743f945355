"""What every operator computes: references, eager implementations, registrations and public functions."""
