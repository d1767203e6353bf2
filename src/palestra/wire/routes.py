"""The experts that an engine chose, between vLLM's form, ours, and arrays.

Legend: M tokens with routes, L layers of the decoder, K experts of a token in a layer.

vLLM gives the `.npy` file of an [M, L, K] array in base64, with the last piece of a reply. Ours is its content alone:
L x K bytes a token up to 256 experts, twice as many for more.
"""

import binascii
import io
from collections.abc import Sequence

import numpy as np

from palestra.core.records import NO_ROUTES, Routes

_WIDTHS = {np.dtype(np.uint8): 1, np.dtype(np.uint16): 2}


def read_routes(text: str, *, num_tokens: int) -> Routes:
    """Errors: ValueError, if it is no such array, or not of `num_tokens`."""
    try:
        array_MLK = np.load(io.BytesIO(binascii.a2b_base64(text, strict_mode=True)), allow_pickle=False)
    except EOFError as error:
        raise ValueError(str(error)) from error
    if array_MLK.ndim != 3 or array_MLK.dtype not in _WIDTHS or len(array_MLK) != num_tokens:
        raise ValueError(f"{array_MLK.dtype} {list(array_MLK.shape)} is no array of {num_tokens} tokens")
    return routes_of(array_MLK)


def routes_of(array_MLK: np.ndarray) -> Routes:
    if not len(array_MLK):
        return NO_ROUTES
    _, num_layers, num_chosen = array_MLK.shape
    data = array_MLK.astype(array_MLK.dtype.newbyteorder("<"), copy=False).tobytes()
    return Routes(data, num_layers, num_chosen, _WIDTHS[array_MLK.dtype])


def as_array(routes: Routes) -> np.ndarray:
    """[M, L, K]."""
    return np.frombuffer(routes.data, f"<u{routes.width}").reshape(-1, routes.num_layers, routes.num_chosen)


def stacked(parts: Sequence[Routes]) -> np.ndarray:
    """[M, L, K] of all parts, one after the other; [0, 0, 0] where there are none.

    Errors: ValueError, if they are of different models.
    """
    known = [as_array(part) for part in parts if part.data]
    return np.concatenate(known) if known else np.zeros((0, 0, 0), np.uint8)
