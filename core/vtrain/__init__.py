"""vtrain: a trainer for video diffusion models.

The layers, each importing only those to its left::

    contract < {config, registry} < plan < data < {train, validate} < cli
"""

from importlib.metadata import version

__version__ = version("vtrain")
