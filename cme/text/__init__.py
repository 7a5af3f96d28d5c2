"""Conversation -> token ids, and back to the characters that they are of."""
