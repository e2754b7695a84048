"""What filling found that cannot be used. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from vtrain.data.sample import Sample


@dataclass
class Unusable:
    """files: "<dataset>/<ref id>" -> why that file is left out. windows: of other files, id of the sample -> start -> why."""

    files: dict[str, str] = field(default_factory=dict)
    windows: dict[str, dict[float, str]] = field(default_factory=dict)

    def __or__(self, other: Unusable) -> Unusable:
        return Unusable(self.files | other.files, self.windows | other.windows)

    def usable(self, sample: Sample) -> tuple[float, ...]:
        """The starts of a sample's windows that can be used."""
        if sample.file in self.files:
            return ()
        out = self.windows.get(sample.id)
        return tuple(start for start in sample.starts if start not in out) if out else sample.starts

    def told(self) -> dict[str, str]:
        """Everything by name, with why."""
        windows = {
            f"{name}, the window at {start:g} s": why
            for name, starts in self.windows.items()
            for start, why in starts.items()
        }
        return dict(sorted((self.files | windows).items()))
