"""The work behind the command `neml2-aoti`, as plain functions: what they return is what `--json` prints."""
