"""TOML text to typed tables: every problem at once, each with its line."""
