"""Interactive notebook front ends: detection, and delivery of widget clicks while a cell runs."""

import inspect
import sys
import threading

from kdlib import environment

IMMEDIATE = {"comm_open", "comm_msg", "comm_close", "comm_info_request", "kernel_info_request"}
"""Message types to handle while a cell runs: widget messages and information requests."""


def kernel():
    """Returns the IPython kernel of this process, or None."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None)


def find_front_end():
    """Returns a `FrontEnd` if the running cell has an interactive one, else None. Editors allow a cell to ask for
    input; batch runners (papermill, nbconvert, nbval) do not.
    """
    current = kernel()
    if current is None or environment.in_batch_kernel() or not getattr(current, "_allow_stdin", False):
        return None
    return FrontEnd(current)


def show(content):
    """Displays a widget, or the bytes of a PNG."""
    from IPython import display

    display.display(display.Image(content) if isinstance(content, bytes) else content)


class FrontEnd:
    """Reader of widget clicks while a cell runs. Most kernels run cells and widget handlers in one thread, so without
    `read` a click waits for the end of the cell.

    `read` briefly replaces the callback of the kernel's message stream. It handles widget messages itself and passes
    all others to the callback in order. Nothing else in the kernel changes.
    """

    def __init__(self, kernel):
        self.kernel = kernel
        self.stream, self.reply_stream = _streams(kernel)

    @property
    def can_read(self):
        """Whether clicks are handled. The kernel itself handles them if cells run outside the main thread."""
        return self.stream is not None or not _in_main_thread()

    def read(self):
        """Handles all waiting clicks."""
        if self.stream is None or not _in_main_thread():
            return
        waiting, callback = [], self.stream._recv_callback
        self.stream.on_recv(waiting.append, copy=False)
        try:
            self.stream.flush()
        finally:
            self.stream.on_recv(callback, copy=False)
            for message in waiting:
                if not self._handle(message):
                    self.stream._run_callback(callback, message)
        if waiting:
            self.stream.flush(2)  # sends replies, receives nothing

    def _handle(self, message):
        """Runs the handler of an `IMMEDIATE` message. Returns whether the message was one."""
        session, kernel = self.kernel.session, self.kernel
        try:
            idents, parts = session.feed_identities(message, copy=False)
            kind = session.deserialize(parts, content=False, copy=False)["header"]["msg_type"]
            if kind not in IMMEDIATE:
                return False
            content = session.deserialize(parts, content=True, copy=False)
        except Exception:  # noqa: BLE001 - not a valid message; the kernel reports it
            return False
        kernel._publish_status("busy", "shell", parent=content)
        try:
            result = kernel.shell_handlers[kind](self.reply_stream, idents, content)
            if inspect.iscoroutine(result):  # these handlers never await, so one step completes them
                result.send(None)
        except StopIteration:
            pass
        except Exception:
            kernel.log.exception("error in a widget message that was handled while a cell was running")
        kernel._publish_status("idle", "shell", parent=content)
        kernel._publish_status("busy", "shell")  # the cell is still running
        return True


def _in_main_thread():
    return threading.current_thread() is threading.main_thread()


def _streams(kernel):
    """Returns the main thread's message and reply streams, or `(None, None)` for an unknown kind of kernel."""
    try:
        if kernel.shell_channel_thread is None:
            stream = replies = kernel.shell_stream
        else:
            subshells = kernel.shell_channel_thread.manager
            stream = subshells.get_shell_channel_to_subshell_pair(None).to_stream
            replies = subshells.get_subshell_to_shell_channel_socket(None)
    except AttributeError:
        stream = replies = getattr(kernel, "shell_stream", None)
    methods = ("_recv_callback", "_run_callback", "on_recv", "flush")
    if all(hasattr(stream, name) for name in methods) and hasattr(kernel, "shell_handlers"):
        return stream, replies
    return None, None
