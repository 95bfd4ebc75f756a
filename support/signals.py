"""Signals: a run that is told to end finishes its step, saves, and ends.

    SIGTERM   kill, or a scheduler that takes the machine away     exit code 143
    SIGHUP    the terminal is closed                                         129
    SIGINT    Ctrl-C                                                         130

Codes are 128 + the signal's number, as a shell has it. The second signal ends the process at once: nothing is lost but
the steps since the last checkpoint. But a SIGTERM or SIGHUP that follows its like within ECHO seconds is the same one,
come another way: a scheduler tells the process, and torchrun as well, which passes it on.

No torch here: train_tpu.py has none either.
"""

import contextlib
import os
import signal
import threading
import time

ECHO = 1.0


class Stopped(SystemExit):
    """Ends a run that was told to end. It is an exit, with the code that says so, and no error."""

    def __init__(self, number):
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


class Stop:
    """Within `with Stop() as stop`, the first signal is kept in stop.number, and the loop ends when it is ready to.

    with Stop() as stop:
        …                                  a signal ends this where it stands: there is nothing to lose yet
        stop.waits = True
        for step in …:
            …                              a signal waits
            with stop.anywhere():
                …                          a signal ends this where it stands
            if stop.number:
                raise Stopped(stop.number)
    """

    def __init__(self):
        self.number = 0  # of the signal that came; 0: none
        self.came = 0.0  # when, in seconds
        self.waits = False  # whether a signal waits until the loop asks for it
        self.before = {}  # {signal: what was done about it before}

    def __enter__(self):
        names = ("SIGTERM", "SIGHUP", "SIGINT")  # other systems than Unix have no SIGHUP
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        in_main_thread = threading.current_thread() is threading.main_thread()  # elsewhere Python refuses handlers
        for number in numbers if in_main_thread else ():
            # nohup has a program ignore SIGHUP: it stays ignored
            if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:
                self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, kind, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if kind is None and self.number:  # it came after the last step
            raise Stopped(self.number)

    def handle(self, number, frame):
        now = time.monotonic()
        if number == self.number != signal.SIGINT and now - self.came < ECHO:
            return
        if self.number:
            os._exit(128 + number)
        self.number, self.came = number, now
        for output in (1, 2):  # of a terminal that was closed: what is printed from now on goes nowhere
            try:
                os.write(output, b"")
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), output)
        if not self.waits:
            self.waits = True  # what is done about it is not to be broken off as well
            raise Stopped(number)

    @contextlib.contextmanager
    def anywhere(self, allowed=True):
        """Within, a signal ends what is running where it stands, by a Stopped. One that waits already does so now."""
        if allowed and self.number:
            raise Stopped(self.number)
        self.waits = not allowed
        try:
            yield
        finally:
            self.waits = True
