"""Measurements: what masking and the fast model buy, on the machine at hand."""
