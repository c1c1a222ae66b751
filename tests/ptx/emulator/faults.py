"""What goes wrong in a program, and what the machine does not know."""

__all__ = ["Fault", "Unsupported"]


class Fault(Exception):
    """The program did what on the part would be undefined, or would never end."""


class Unsupported(Exception):
    """The program has an instruction, or a form of one, that the machine does not know."""
