"""Entry points to a catalog; a broken plugin is a row with its reason."""

from vtrain.contract.specs import part_or_error
from vtrain.registry.discovery import discover

__all__ = ["discover", "part_or_error"]
