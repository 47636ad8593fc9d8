"""What a client says when something fails: a code of this list, never a text.

The text of an error may hold what the data holds (a label, a column, the name of a file), so it
stays in the client's own log. The server gets the code, for an unexpected error the name of
Python's exception, and for a record its row; the sentence that it shows is the one written here.
"""

import re
from dataclasses import dataclass
from typing import Self

#: What the server says of each code. The part before the first hyphen is its kind.
SENTENCES = {
    "settings": "the run's settings cannot be used on this client",
    "node-config": "its node config has a value that cannot be used",
    "node-policy": "its policy file cannot be read, so that nothing is allowed",
    "node-partition": "it has no partition-id, and the run deals one data set to several clients: "
    "set partition-id and num-partitions in its node config, or partition.kind=local",
    "node-partitions": "its partition-id and num-partitions do not fit: parts count from 0",
    "policy-model": "its policy does not allow this base model or revision",
    "policy-code": "its policy does not allow model code from the hub (model.trust-remote-code)",
    "policy-data": "its policy does not allow this data",
    "policy-columns": "its policy does not allow these columns",
    "policy-write": "its policy does not allow writing where the run asks for",
    "policy-work": "its policy does not allow so many epochs, steps or rounds",
    "policy-memory": "its policy does not allow so much memory",
    "policy-minutes": "its policy's minutes for one training are over",
    "policy-samples": "it holds fewer samples than its policy asks for",
    "model-missing": "its base model cannot be found: install it on the client",
    "model-unusable": "its base model cannot be loaded or adapted",
    "model-differs": "its base model is not the server's: install the same weights, and the same "
    "versions of transformers, on both",
    "data-missing": "its data is not there, or nothing matches data.train or data.test",
    "data-format": "its data cannot be read: a wrong file format, or a damaged file",
    "data-column": "its data lacks a column that the run asks for (data.input-column, "
    "data.label-column, data.format or partition.column)",
    "data-label": "its data has a label that is no class: set data.class-names, or "
    "data.bad-records=skip",
    "data-classes": "its classes cannot be numbered as the run asks: set data.class-names",
    "data-record": "its data has a record that cannot be used (data.bad-records=skip leaves such "
    "records out)",
    "data-empty": "it has no samples to train or to measure on",
    "data-split": "its data cannot be split by data.test-fraction with every class on both sides",
    "data-partition": "its data cannot be dealt as the run's partition asks",
    "memory-out": "it ran out of memory, with the smallest plan too",
    "message-bad": "the message to it cannot be used",
    "message-size": "a message is larger than client.message-mib",
    "message-lost": "it has lost its state: it does not hold the adapter that it was sent before",
    "worker-died": "its worker died (killed, or out of memory): this update is lost, and the next "
    "message starts another",
    "worker-start": "its worker could not be started",
    "worker-group": "a process of its group failed",
    "package-missing": "a package is not installed on it, or in another version",
    "unexpected": "it raised an error that has no code of its own",
}
_WHERE = "the text is in the client's own log"
_WRITTEN = re.compile(
    r"rankfit (?P<code>[a-z-]{1,40})(?: (?P<kind>[A-Za-z]{1,40}))?(?: row=(?P<row>\d{1,15}))?"
    r"(?: text=(?P<text>.*))?",
    re.DOTALL,
)
_LONGEST_TEXT = 500


@dataclass(frozen=True)
class Fault:
    """What went wrong on a client.

    Attributes
    ----------
    code : str
        A key of :data:`SENTENCES`.
    row : int or None
        Of the record at fault.
    kind : str
        Name of Python's own exception, of an unexpected error.
    text : str
        Leaves a client only if the node's owner lets texts out.
    """

    code: str
    row: int | None = None
    kind: str = ""
    text: str = ""

    def written(self) -> str:
        """As it travels; inverse of :meth:`read`."""
        parts = ["rankfit", self.code, self.kind]
        parts += ["" if self.row is None else f"row={self.row}"]
        parts += [f"text={self.text[:_LONGEST_TEXT]}" if self.text else ""]
        return " ".join(part for part in parts if part)

    @classmethod
    def read(cls, text: str) -> "Fault | None":
        """A fault that was written; None for any other text."""
        found = _WRITTEN.fullmatch(text)
        if found is None or found["code"] not in SENTENCES:
            return None
        row = None if found["row"] is None else int(found["row"])
        return cls(found["code"], row, found["kind"] or "", (found["text"] or "")[:_LONGEST_TEXT])

    def sentence(self) -> str:
        """What the server shows."""
        row = "" if self.row is None else f"row {self.row}"
        where = ", ".join(part for part in (self.code, self.kind, row) if part)
        said = "".join(c if c.isprintable() else " " for c in self.text) or _WHERE
        return f"{SENTENCES[self.code]} [{where}]; {said}"


class Faulty(Exception):
    """An error that has a code.

    Parameters
    ----------
    message : str
        For who reads the client's log.
    fault : str, optional
        A key of :data:`SENTENCES` (default: that of the class).
    row : int, optional
        Of the record at fault.
    """

    code = "unexpected"

    def __init__(self, message: str = "", *, fault: str = "", row: int | None = None) -> None:
        super().__init__(message)
        self.coded = Fault(fault or self.code, row, text=message)

    @classmethod
    def of(cls, fault: Fault) -> Self:
        """An error that another process had."""
        error = cls(fault.text)
        error.coded = fault
        return error


def fault_of(error: BaseException) -> Fault:
    """The fault that an exception amounts to, with its text."""
    text = str(error)
    if isinstance(error, Faulty):
        return error.coded
    if type(error).__name__ == "OutOfMemoryError":  # torch's; this module does not import it
        return Fault("memory-out", kind="OutOfMemoryError", text=text)
    if isinstance(error, ImportError):
        return Fault("package-missing", text=text)
    # The name of another library's class may be made from data; Python's own are known.
    own = type(error).__module__ == "builtins"
    return Fault("unexpected", kind=type(error).__name__ if own else "", text=text)
