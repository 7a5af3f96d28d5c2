"""`cme eval text A B`: what training did to the text."""
