"""`cme eval correctness`: does a verifier's likelihood tell right answers from wrong, and do its controls."""
