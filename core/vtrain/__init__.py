"""vtrain: a trainer for video diffusion models.

The layers, each importing only those to its left::

    contract < {config, registry} < plan < data < {train, validate} < cli
"""

__version__: str
"""Of the installed distribution."""


def __getattr__(name: str) -> str:
    """`__version__`, read at its first use: importing importlib.metadata takes as long as the rest of `vtrain --help`."""
    if name != "__version__":
        raise AttributeError(f"module 'vtrain' has no attribute '{name}'")
    from importlib.metadata import version

    return version("vtrain")
