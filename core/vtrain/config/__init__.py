"""TOML text to typed tables: every problem at once, each with its line."""

from vtrain.config.keys import KeyPath, key_path, key_text
from vtrain.config.load import load
from vtrain.config.record import TABLES, Config, NoKeys, Part, ShownValue, Table, show
from vtrain.config.schema import Option, describe, json_schema

__all__ = [
    "TABLES",
    "Config",
    "KeyPath",
    "NoKeys",
    "Option",
    "Part",
    "ShownValue",
    "Table",
    "describe",
    "json_schema",
    "key_path",
    "key_text",
    "load",
    "show",
]
