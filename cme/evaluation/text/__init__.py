"""`cme eval text A B`: how training changed the text."""
