"""Errors whose message is all a user needs: what is wrong, and what to do about it."""

from __future__ import annotations


class CMEError(RuntimeError):
    """Base of the project's own errors; the command line prints them without a traceback."""


class ModelError(CMEError):
    """A model that can't be loaded, is broken, or can't be scored exactly."""


class DatasetError(CMEError):
    """A dataset that can't be found or read, or that lacks what training needs."""
