"""Samples to cached entries: encoded once, named by their content, shared between processes and runs."""
