class UserError(Exception):
    """A mistake in the user's input: the scripts print it as one line and exit with code 2."""

    def __init__(self, message: str):
        # One from a DataLoader's worker comes as "Caught UserError in ...", a traceback, and the message at its end.
        super().__init__(message.rstrip().rpartition("\nperceiver.errors.UserError: ")[2])
