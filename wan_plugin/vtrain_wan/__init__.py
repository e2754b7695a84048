"""Wan for vtrain."""
