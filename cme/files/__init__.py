"""Files of rows, of journals, and of results: read strictly, written whole or not at all."""
