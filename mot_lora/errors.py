"""The one exception for mistakes that the user can mend."""


class UserError(ValueError):
    """A mistake in a file, a setting or a call, whose one-line message says what to do.

    The commands print it as `error: ...` and end with exit status 2.

    >>> raise UserError("recipe.yaml: `rouds` is not a setting; did you mean `rounds`?")
    Traceback (most recent call last):
    mot_lora.errors.UserError: recipe.yaml: `rouds` is not a setting; did you mean `rounds`?
    """
