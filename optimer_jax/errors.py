"""What ends a command early: two errors that a user can do something about, and preemption."""


class UserError(Exception):
  """One sentence: what is wrong, where, and what to do. The command line prints it and exits 1."""


class UsageError(UserError):
  """The command itself was wrong: an unknown name, flag or value. The command line exits 2."""


class Preempted(Exception):
  """SIGTERM came and everything is saved: the command line exits 75, and the same command goes on.

  75 is EX_TEMPFAIL of sysexits.h, which a JobSet can restart on without counting it as a failure.
  """
