"""SANA-Video for vtrain."""
