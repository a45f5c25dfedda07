"""Writes the pages of this folder that are made from code: python -m docs.generated."""
