"""The command `neml2-aoti`: its options in `app`, and a module for each command, or for small ones that go together."""

from .process import main as main
