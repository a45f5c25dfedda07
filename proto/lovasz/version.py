"""The version of all three parts; pyproject reads it from here."""

VERSION = "0.1.0"
