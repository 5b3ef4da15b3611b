"""The two errors that a user can do something about."""


class UserError(Exception):
  """One sentence: what is wrong, where, and what to do. The command line prints it and exits 1."""


class UsageError(UserError):
  """The command itself was wrong: an unknown name, flag or value. The command line exits 2."""
