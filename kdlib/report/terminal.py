"""Whoever sits in front of a notebook while one of its cells runs: whether there is anybody, and what they click."""

import inspect
import sys
import threading

from kdlib import environment

AT_ONCE = {"comm_open", "comm_msg", "comm_close", "comm_info_request", "kernel_info_request"}
"""Messages that a running cell does not have to keep waiting: they are of widgets, or only ask."""


def kernel():
    """The IPython kernel that this process is, None where it is none."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None)


def somebody():
    """A `FrontEnd` where somebody watches the running cell, else None. What runs notebooks by the batch (papermill,
    nbconvert, nbval) says with each cell that nobody will answer its questions; an editor says the opposite.
    """
    found = kernel()
    if found is None or environment.in_batch_kernel() or not getattr(found, "_allow_stdin", False):
        return None
    return FrontEnd(found)


def show(thing):
    """Display a widget, or the bytes of a PNG."""
    from IPython import display

    display.display(display.Image(thing) if isinstance(thing, bytes) else thing)


class FrontEnd:
    """Reads what is clicked while a cell runs. A kernel has one thread for its cells and (but for some of the newest, with
    some editors) for its widgets too: without `read` a click would wait for the cell's end.

    Messages come by a stream that hands each to a callback. For a moment this is put in its place: what is of widgets is
    dealt with here and now; all else goes to the callback, in its order. Nothing else of the kernel is changed.
    """

    def __init__(self, kernel):
        self.kernel = kernel
        self.stream, self.answers = _streams(kernel)

    @property
    def hears(self):
        """Whether clicks are dealt with: where cells run in another thread than this one, the kernel does it."""
        return self.stream is not None or not _in_main_thread()

    def read(self):
        """Deal with all clicks that wait."""
        if self.stream is None or not _in_main_thread():
            return
        waiting, callback = [], self.stream._recv_callback
        self.stream.on_recv(waiting.append, copy=False)
        try:
            self.stream.flush()
        finally:
            self.stream.on_recv(callback, copy=False)
            for message in waiting:
                if not self._dealt_with(message):
                    self.stream._run_callback(callback, message)
        if waiting:
            self.stream.flush(2)  # answers, and nothing new

    def _dealt_with(self, message):
        """Whether this was a message of a widget; then its handler has run."""
        session, kernel = self.kernel.session, self.kernel
        try:
            idents, parts = session.feed_identities(message, copy=False)
            kind = session.deserialize(parts, content=False, copy=False)["header"]["msg_type"]
            if kind not in AT_ONCE:
                return False
            read = session.deserialize(parts, content=True, copy=False)
        except Exception:  # noqa: BLE001 - it is no message; the kernel will say so
            return False
        kernel._publish_status("busy", "shell", parent=read)
        try:
            made = kernel.shell_handlers[kind](self.answers, idents, read)
            if inspect.iscoroutine(made):  # these never wait: their first step is their last
                made.send(None)
        except StopIteration:
            pass
        except Exception:
            kernel.log.exception("a widget's message, read while a cell was running")
        kernel._publish_status("idle", "shell", parent=read)
        kernel._publish_status("busy", "shell")  # which the cell still is
        return True


def _in_main_thread():
    return threading.current_thread() is threading.main_thread()


def _streams(kernel):
    """The stream by which messages come to the main thread, and where answers go; `(None, None)` where this kernel is of a
    kind that is not known.
    """
    try:
        if kernel.shell_channel_thread is None:
            stream = answers = kernel.shell_stream
        else:
            subshells = kernel.shell_channel_thread.manager
            stream = subshells.get_shell_channel_to_subshell_pair(None).to_stream
            answers = subshells.get_subshell_to_shell_channel_socket(None)
    except AttributeError:
        stream = answers = getattr(kernel, "shell_stream", None)
    needed = ("_recv_callback", "_run_callback", "on_recv", "flush")
    if all(hasattr(stream, name) for name in needed) and hasattr(kernel, "shell_handlers"):
        return stream, answers
    return None, None
