"""Errors for people: exceptions whose message is meant for the user, and how a program says them.

Exit status 2: what was asked for can't be done. 1: a run has failed. 128 + n: ended by signal n,
75: ended by --stop-after; what is done is then saved.
"""

import argparse
import errno
import os
import re
import sys
import traceback

MOST_CHARACTERS = 1 << 17
LESS = (
    "A smaller --batch or --teacher-batch needs less. In training so do --checkpointing and "
    "--accumulate, which go on in the same folder; --dry-run tells how much."
)
COMPILER = "try --compile no, or delete what it keeps in TORCHINDUCTOR_CACHE_DIR or in /tmp"


class UserError(Exception):
    """Something that the user can mend; the message says what, where and what to do."""


class DataError(UserError):
    """Something is wrong with the user's data."""


class NotFetched(DataError):
    """Data that is not here could not be downloaded."""


class CheckpointError(UserError, ValueError):
    """A file is not a checkpoint that can be used."""


class UsageError(UserError):
    """What the user asked for can't be done."""


class RunError(Exception):
    """The run can't go on; the message says why and what to do."""


ENDS = (UserError, RunError, OSError, MemoryError, RuntimeError)  # what a program catches


class Stop(BaseException):
    """The run was asked to end, and what it has is saved; holds the exit status. Like Ctrl-C's
    own exception it passes by `except Exception`."""


def clean(text, most=MOST_CHARACTERS):
    """A stranger's text, fit for files and terminals: one line, no control characters, cut."""
    text = str(text)[:most].encode("utf-8", "replace").decode()  # "?" for halves of characters
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text).strip()


def plural(n, word, more="s"):
    """How many there are: 1 class, 2,000 classes."""
    return f"{n:,} {word if n == 1 else word + more}"


def reason(error, most=100):
    """The first line of an error's text, with the next after ":"; its kind where it has none."""
    return (str(error).replace(":\n\t", ": ") or type(error).__name__).splitlines()[0][:most]


def first_cause(error):
    """The error that others came of: PyTorch tells the last of them."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def some(names, most=3):
    """The first of the names, as text."""
    return ", ".join([*names[:most], "…"] if len(names) > most else names)


def no_memory(error):
    """Whether an error says that memory, the machine's or a GPU's, was not enough."""
    words = "(out of|enough|allocate) memory|ALLOC_FAILED"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error), re.IGNORECASE))


def of_compiler(error):
    """Whether an error is of the compiler behind torch.compile, and not of what it compiles."""
    return type(error).__module__.startswith("torch._inductor")


def pass_on(error, path):
    """Raises an error of reading a file again where it tells nothing of the file's content, so that
    a sound file is not called damaged: no permission, a failing disk, no memory."""
    of_content = (None, errno.EINVAL, errno.ENOENT)
    system = isinstance(error, OSError) and error.errno not in of_content
    if system or isinstance(error, RunError):
        raise error
    if no_memory(error):
        raise RunError(f"{path}: {reason(error, 1000)}") from None


def exit_status(program, error):
    """Says why a program ends: in one line if that was foreseen. -> its exit status"""
    if isinstance(error, KeyboardInterrupt):
        print(f"{program}: interrupted{clean(error)}", file=sys.stderr)
        return 130  # 128 + SIGINT
    if isinstance(error, (UserError, RunError, OSError)):
        print(f"{program}: {clean(error, 4000)}", file=sys.stderr)
    elif no_memory(error):
        print(f"{program}: no memory is left ({clean(reason(error))}). {LESS}", file=sys.stderr)
    elif of_compiler(error):
        print(f"{program}: --compile: {clean(reason(error, 1000))}; {COMPILER}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return 2 if isinstance(error, UserError) else 1


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line and status 2; --help shows the rest.

    Every program has one, and begins with it: from then on a character that the terminal or the
    file behind it can't show (Windows, Latin-1) is a "?", and does not end the program."""

    def __init__(self, program, description, **options):
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:  # closed, as by 2>&-
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
            elif hasattr(stream, "reconfigure"):  # tests put others in their place
                stream.reconfigure(errors="replace")

        def uncaught(kind, error, trace):
            print(file=sys.stderr)  # below the ^C of a terminal
            exit_status(program, error)

        sys.excepthook = uncaught
        super().__init__(program, description=description, allow_abbrev=False, **options)

    def error(self, message):
        message = message.replace("invalid parse_", "invalid ")  # argparse tells a function's name
        self.exit(2, f"{self.prog}: {message} (--help lists all options)\n")
