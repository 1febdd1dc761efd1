"""A file's bytes, decompressed. How it is compressed is recognised by its first bytes, whatever it is called."""

import bz2
import codecs
import gzip
import io
import lzma
import zipfile
import zlib
from pathlib import Path

from workloads.jobs import WorkloadError

KINDS = {b"\x1f\x8b": "gzip", b"\xfd7zXZ\0": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
ENDINGS = (".gz", ".xz", ".bz2", ".zst", ".zip")


def read_bytes(path: str, wanted: str = "an SWF trace") -> bytes:
    """What is in the file, plain or compressed with gzip, xz, bzip2, zstd or, as the only member, zip.

    Raises:
        WorkloadError: it cannot be read, is damaged, or an archive of several files.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise WorkloadError(f"{path}: {error.strerror}; give the path of {wanted}") from error
    kind = next((kind for magic, kind in KINDS.items() if data.startswith(magic)), "")
    try:
        return _decompress(path, data, kind)
    except WorkloadError:
        raise
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise WorkloadError(f"{path}: damaged or truncated {kind} file ({error}); fetch it again") from error


def as_text(data: bytes) -> str:
    """UTF-8 or, where its mark is at the beginning (programs of Windows write it), UTF-16."""
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if utf16 else "utf-8-sig", errors="replace")


def _decompress(path: str, data: bytes, kind: str) -> bytes:
    if kind == "gzip":
        return gzip.decompress(data)
    if kind == "xz":
        return lzma.decompress(data)
    if kind == "bzip2":
        return bz2.decompress(data)
    if kind == "zstd":
        import pyarrow  # takes 0.1 s, which only such a file is worth

        with pyarrow.input_stream(io.BytesIO(data), compression="zstd") as stream:
            return bytes(stream.read())
    return _only_member(path, data) if kind == "zip" else data


def _only_member(path: str, data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        # macOS puts a shadow of every file beside it.
        members = [m for m in archive.infolist() if not m.is_dir() and not m.filename.startswith("__MACOSX/")]
        if len(members) != 1:
            names = ", ".join(member.filename for member in members[:3]) or "none"
            raise WorkloadError(f"{path}: {len(members)} files in it ({names}); unpack it, and give the trace")
        if members[0].flag_bits & 1:
            raise WorkloadError(f"{path}: {members[0].filename} is encrypted; unpack it, and give the trace")
        try:
            return archive.read(members[0])
        except NotImplementedError as error:
            raise WorkloadError(f"{path}: {error}; unpack it, and give the trace") from None
