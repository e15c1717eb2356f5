"""What a file of weights is, told by its content: its name may end in anything."""

from lib.errors import CheckpointError

STRANGERS = {  # how a file begins: what it is, and what to do
    b"GGUF": "a GGUF file, with numbers of a few bits; give the .safetensors that it was made from",
    b"version https://git-lfs": "the pointer of git-lfs, not the file itself; get it: git lfs pull",
    b"\x80": "an old pickle of PyTorch, which can run code; give a .safetensors",
    b"\x89HDF": "a HDF5 file of another program; give a .safetensors",
    b"": "neither a .safetensors nor a file of torch.save",
}


def kind_of(path):
    """ "torch" or "safetensors"; CheckpointError says what another file is."""
    with open(path, "rb") as file:
        start = file.read(1024)
    if start.startswith(b"PK"):  # torch.save packs a zip
        return "torch"
    if start[8:9] == b"{":  # the length of the header, and the header
        return "safetensors"
    what = next(what for begin, what in STRANGERS.items() if start.startswith(begin))
    if not start:
        what = "an empty file; get it again"
    elif what == STRANGERS[b""] and is_text(start):
        what = f"text ({start.decode(errors='replace')[:40]!r} …), not weights; get it again"
    raise CheckpointError(f"{path}: can't be read: {what}.")


def is_text(start):
    """Whether bytes are those of a web page, a message or the like."""
    return all(byte >= 32 or byte in b"\t\n\r" for byte in start)
