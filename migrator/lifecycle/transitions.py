"""What every change of a migration's stage has in common: it is checked, announced, and applied, in this order."""

from __future__ import annotations

from abc import ABC, abstractmethod


class Transition(ABC):
    """One change of stage. What is announced and what is applied is the same object, so they cannot differ."""

    @abstractmethod
    def check(self) -> None:
        """Raises `PreconditionFailed` naming the command that comes first; changes nothing."""

    @abstractmethod
    def describe(self) -> str:
        """What `apply` will do, as the end of a sentence. After `check`."""

    @abstractmethod
    def apply(self) -> str:
        """Makes the change and returns what was done. Safe to repeat after a kill. After `check`."""

    def notes(self) -> str:
        """What is added to both sentences, starting with a separator."""
        return ""

    def summary(self) -> str:
        """`describe` with the notes."""
        return f"{self.describe()}{self.notes()}"

    def run(self) -> str:
        """`apply`, and its sentence with the notes."""
        return f"{self.apply()}{self.notes()}"
