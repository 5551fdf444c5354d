"""Say in one plain line why a sample failed, whatever exception it raised."""

from __future__ import annotations


def reason_of(error: BaseException) -> str:
    """Return one line for a report: no traceback, no class name, no line break."""
    text = " ".join(str(error).split())
    match error:
        case UnicodeDecodeError():
            return f"not {error.encoding} (byte 0x{error.object[error.start]:02x} at position {error.start})"
        case UnicodeEncodeError():
            return f"not valid Unicode ({error.reason})"
        case RecursionError():
            return "nested too deeply"
        case MemoryError():
            return "needs more memory than there is"
        case OverflowError():
            return f"a number out of range ({text or 'too large'})"
        case EOFError():
            return "ends early"
        case KeyError():
            return f"no {error.args[0]!r}" if error.args else "a key is missing"
        case OSError():
            return (
                f"{error.filename}: {error.strerror}"
                if error.filename and error.strerror
                else error.strerror or text
            )
        case TypeError() | AttributeError() | IndexError():
            return f"a value of another kind than expected ({text})"
    return text or "an unknown error"
