"""TOML text to typed tables: every problem at once, each with its line."""

from vtrain.config.load import load
from vtrain.config.record import Config, KeyPath, NoKeys, Part
from vtrain.config.schema import Option, describe, json_schema
from vtrain.config.show import Row, show

__all__ = ["Config", "KeyPath", "NoKeys", "Option", "Part", "Row", "describe", "json_schema", "load", "show"]
