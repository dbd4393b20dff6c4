"""The group of all verbs: a number that is none is told in this project's words, not in those of the CLI library."""

from typing import Any

import typer
from typer.core import TyperGroup

from ds_slm.errors import ConfigError

EXPECTED = {
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "float_parsing": "a number",
    "greater_than_equal": "{ge:g} or more",
    "less_than_equal": "{le:g} or less",
}
"""What a flag takes, by the kind of pydantic's error."""


class VerbGroup(TyperGroup):
    """Runs a verb."""

    def invoke(self, ctx: Any) -> Any:
        """As the library does. Raises ConfigError for a flag whose value cannot be read: what was got, and expected."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            from pydantic import ValidationError

            cause, flag = error.__cause__, error.param
            if not isinstance(cause, ValidationError) or flag is None:
                raise
            found = cause.errors()[0]
            if found["type"] not in EXPECTED:
                raise
            expected = EXPECTED[found["type"]].format(**found.get("ctx", {}))
            name, unit = flag.opts[0], f" ({flag.metavar})" if flag.metavar not in (None, "N") else ""
            verb = error.ctx.command_path if error.ctx else "ds-slm"
            raise ConfigError(
                f"{name} {found['input']!r}: expected {expected}{unit}; {verb} --help lists the flags."
            ) from error
