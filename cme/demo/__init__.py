"""What `python -m cme.train` runs on when it is given nothing: two small real models and a set of questions."""
