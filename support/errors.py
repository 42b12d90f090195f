"""What a user can mend, and how text from elsewhere is shown in a message."""

import reprlib

shorten = reprlib.Repr()
shorten.maxstring = shorten.maxother = shorten.maxlong = 60
shorten.maxlevel = 2


class UserError(ValueError):
    """Something the user can mend; scripts print it as one line and exit with code 2."""


class RankError(UserError):
    """Said by one of several processes for all of them; empty where another has said it."""


def quote(value: object) -> str:
    """A value from a file as a message shows it: its repr, cut; it can neither flood nor steer a terminal."""
    return shorten.repr(value)


def one_line(text: object, limit: int = 200) -> str:
    """Text from elsewhere for the middle of a message: as `quote`, but without quotation marks."""
    text = " ".join(str(text)[: 10 * limit].split())
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."
