class UserError(Exception):
    """A mistake in the user's input: the scripts print it as one line and exit with code 2."""
