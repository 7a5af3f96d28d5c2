"""The defaults of `python -m cme.train`: two small real models, fetched and converted once, and its options."""
