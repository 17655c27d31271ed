"""espeak-ng from the wheel that carries it (no download, no root): its library and data, and how it is started."""

import _ctypes
import ctypes
import functools
import os
import shutil
import tempfile
from pathlib import Path

import espeakng_loader

LONGEST_PATH = 159  # bytes of the data's path: espeak-ng 1.52 cuts off what is longer (path_home[160] in speech.c)
_SYNCHRONOUS, _IPA_EVENTS, _DO_NOT_EXIT = 2, 3, 0x8000  # speak_lib.h
_loaded: list[ctypes.CDLL] = []  # the one library there is at a time, as its variables are


def find_data() -> Path:
    """Return the folder of espeak-ng's data in the wheel."""
    return Path(espeakng_loader.get_data_path())


@functools.cache
def _make_folder() -> tempfile.TemporaryDirectory:
    """Return a folder that is gone at the end of the process: a link to the data, and a copy of the library.

    The link is short however long the path of the checkout is; the copy can be unloaded (phonemizer keeps the original).
    """
    for place in dict.fromkeys((tempfile.gettempdir(), "/tmp")):
        if len(os.fsencode(place)) <= LONGEST_PATH - 40 and os.access(place, os.W_OK):  # 40: for the names below it
            folder = tempfile.TemporaryDirectory(prefix="espeak-", dir=place)
            shutil.copy(espeakng_loader.get_library_path(), folder.name)
            Path(folder.name, "espeak-ng-data").symlink_to(find_data(), target_is_directory=True)
            return folder
    raise RuntimeError(f"espeak-ng's data need a path of {LONGEST_PATH} bytes at most, and {tempfile.gettempdir()} leaves no "
                       "room for one or can not be written to; set the environment variable TMPDIR to a shorter folder")


def load_library() -> tuple[ctypes.CDLL, int]:
    """Return (espeak-ng as it is before its first word, its sample rate in Hz); what it returned before is unloaded.

    Nothing less makes it forget what was said: the phase of the pitch's flutter (wavegen.c) outlives espeak_Terminate. Takes
    0.3 ms, and makes the next clip 2 to 3 ms slower, since voice and dictionary are read again. Raises RuntimeError where
    it does not start.
    """
    folder = Path(_make_folder().name)
    while _loaded:
        library = _loaded.pop()
        library.espeak_Terminate()
        _ctypes.dlclose(library._handle)
    library = ctypes.CDLL(str(folder / Path(espeakng_loader.get_library_path()).name))
    _loaded.append(library)
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, os.fsencode(folder), _IPA_EVENTS | _DO_NOT_EXIT)
    if rate <= 0:
        raise RuntimeError(f"espeak-ng did not start with the data in {find_data()}; run make setup")
    library.espeak_ng_SetRandSeed(ctypes.c_long(0))  # breathy voices draw noise
    return library, rate


def show_data() -> None:
    """Let every espeak-ng in this process that is started without the path of its data (phonemizer's) find them.

    By the environment variable that it reads. Raises RuntimeError where it would not start, which ends the process there.
    """
    load_library()
    os.environ["ESPEAK_DATA_PATH"] = _make_folder().name
