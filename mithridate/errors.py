"""What can go wrong, as one tree.

MithridateError
  InputError             unusable input; the message says what was seen and what is allowed
    OptionError            an unknown name, a number out of range, options that exclude each other
      UnknownDefenceError    a name that no defence has
    DatasetError           a data set that cannot be read
    ModelError             an architecture or weights that cannot be used
    BundleError            a bundle that is incomplete, tampered with, or of another schema
    BuildError             a build that cannot start or go on (disk, lock, leftovers)
    ImageError             an uploaded image that is refused
      ImageTypeError         not JPEG, PNG or WebP
      ImageTooLargeError     more bytes or pixels than allowed
      ImageMalformedError    the right type, but truncated or corrupt
      ImageUnusableError     well-formed, but not something the model can take
  BudgetExceededError      the deadline passed, or the caller cancelled, before there was an answer
"""

from __future__ import annotations


class MithridateError(Exception):
    """Base of every error that Mithridate raises on purpose."""


class InputError(MithridateError):
    """Input that cannot be used. Command line: one line on stderr and exit code 2."""


class OptionError(InputError):
    """An unknown name, a number out of its range, or options that exclude each other."""


class UnknownDefenceError(OptionError):
    """A name that no defence has."""


class DatasetError(InputError):
    """A data set that cannot be found, read or used."""


class ModelError(InputError):
    """An architecture or a weight file that cannot be used."""


class BundleError(InputError):
    """A bundle that is incomplete, tampered with, or written by another schema."""


class BuildError(InputError):
    """A build that cannot start or go on: no space, a lock, leftovers of another build."""


class ImageError(InputError):
    """An image that is refused; the subclasses say why."""


class ImageTypeError(ImageError):
    """Not a JPEG, PNG or WebP file, whatever its declared type."""


class ImageTooLargeError(ImageError):
    """More bytes or pixels than allowed."""


class ImageMalformedError(ImageError):
    """A known type, but truncated or corrupt."""


class ImageUnusableError(ImageError):
    """Well-formed, but of a size or kind the model cannot take."""


class BudgetExceededError(MithridateError):
    """The deadline passed, or the caller cancelled, before there was an answer.

    ``reason`` is ``"deadline"`` or ``"cancelled"``.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"no answer within the budget: {reason}")
        self.reason = reason
