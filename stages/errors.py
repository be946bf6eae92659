"""Errors that a person can act on. Each message names what is wrong, where, and the mend, in one sentence."""


class UserError(Exception):
    """Bad input or environment; the command line prints the message alone and exits with code 2."""


class GraphError(UserError):
    """The base model can't be read, or holds nothing that can be quantized."""


class CacheMismatch(UserError):
    """A calibration cache or a folder of quantized weights belongs to something else."""


class RecipeError(UserError):
    """The requested algorithm, bit widths or patterns don't fit this model."""


class SolveError(UserError):
    """The statistics or weights of a site can't be used (NaN or infinite values, for example)."""
