"""How the types of well-known packages are written, found by their names: nothing here imports a package.

An entry stands for a class and its subclasses; it writes the content, without the class's name and without attributes
that a subclass adds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from hypernodes._signature.stream import Composite, Encoded, block, fields, head, raw, text, whole
from hypernodes.errors import UncacheableError


def _as_text(value: Any) -> bytes:
    return text(str(value))


# The standard library: what is not worth an import of its own, or keeps its content in private slots.


def _decimal(value: Any) -> bytes:
    """By its digits: 1.0 and 1.00 are equal, and print and round differently."""
    sign, digits, exponent = value.as_tuple()
    return whole(sign) + raw(bytes(digits)) + (text(exponent) if isinstance(exponent, str) else whole(exponent))


def _alias(value: Any) -> Composite:
    """Write a form of typing, such as ``Optional[int]``."""
    extra = getattr(value, "__metadata__", ())
    return Composite(b"a", (value.__origin__, getattr(value, "__args__", ()), extra))


# numpy

_FIRST_FOREIGN = 256  # numbers of dtypes: numpy's own are lower


def _dtype(value: Any) -> bytes:
    """By its kind, size, unit and byte order; a type that is not numpy's own, also by its name."""
    if value.names is not None:
        inner = b"".join(text(name) + _dtype(value[name]) for name in value.names)
        return head(b"v", len(value.names)) + whole(value.itemsize) + inner
    if value.subdtype is not None:
        base, shape = value.subdtype
        return head(b"w", len(shape)) + b"".join(map(whole, shape)) + _dtype(base)
    return b"y" + text(value.str) + (text(value.name) if value.num >= _FIRST_FOREIGN else b"")


def _ndarray(value: Any) -> Encoded:
    """By dtype, shape and bytes in C order, read in place if they lie so."""
    numpy = sys.modules["numpy"]
    array = numpy.asarray(value)
    dtype = array.dtype
    header = b"A" + _dtype(dtype) + head(b"n", array.ndim) + b"".join(map(whole, array.shape))
    if dtype.names is not None:  # field by field: what lies between them may be anything
        return Composite(header, [array[name] for name in dtype.names], dtype.names, "[{!r}]")
    if dtype.hasobject:
        return Composite(header, (array.ravel().tolist(),), ("",), "{}")
    flat = numpy.ascontiguousarray(array).reshape(-1)
    if dtype.char in "gG" and numpy.finfo(dtype).nmant == 63:  # 10 bytes of 16 count
        flat = flat.copy()
        flat.view(numpy.uint8).reshape(-1, 16)[:, 10:] = 0
    return block(header, flat.view(numpy.uint8) if flat.nbytes else b"")


def _masked(value: Any) -> Composite:
    numpy = sys.modules["numpy"]
    parts = numpy.asarray(value), numpy.ma.getmaskarray(value), value.fill_value
    return Composite(b"a", parts, ("data", "mask", "fill_value"), ".{}")


# pandas and polars


def _pandas_array(value: Any) -> Composite:
    """Numbers and times in bulk, categories by codes, all else element by element."""
    kind = type(value).__name__
    if kind in ("NumpyExtensionArray", "PandasArray"):
        return Composite(b"a", (value.to_numpy(),), ("",), "{}")
    if kind == "Categorical":
        return Composite(b"a", (value.codes, value.categories, value.ordered))
    if kind in ("DatetimeArray", "TimedeltaArray", "PeriodArray"):
        return Composite(b"a", (str(value.dtype), value.asi8))
    return Composite(b"a", (str(value.dtype), value.to_numpy(dtype=object)), ("", ""), "{}")


def _index(value: Any) -> Composite:
    if type(value).__name__ == "RangeIndex":
        return Composite(b"a", (list(value.names), value.start, value.stop, value.step))
    if type(value).__name__ == "MultiIndex":
        return Composite(b"a", (list(value.names), *(value.get_level_values(i).array for i in range(value.nlevels))))
    return Composite(b"a", (list(value.names), value.array), ("", ""), "{}")


def _series(value: Any) -> Composite:
    return Composite(b"a", (value.array, value.index, value.name, value.attrs), ("", ".index", ".name", ".attrs"), "{}")


def _frame(value: Any) -> Composite:
    columns = [value.iloc[:, i].array for i in range(value.shape[1])]
    labels = (".index", ".columns", ".attrs", *(f"[{name!r}]" if type(name) is str else "" for name in value.columns))
    return Composite(head(b"a", len(columns)), (value.index, value.columns, value.attrs, *columns), labels, "{}")


def _polars_series(value: Any) -> Composite:
    numbers = value.dtype.is_numeric() and not value.dtype.is_decimal() and not value.null_count()
    content = value.to_numpy() if numbers else value.to_list()
    return Composite(b"a", (value.name, str(value.dtype), content), ("", "", ""), "{}")


# torch, scipy, Pillow, pydantic


def _tensor(value: Any) -> Composite:
    """By dtype, shape, bytes, kind of device, and whether it takes gradients."""
    torch = sys.modules["torch"]
    about = str(value.dtype), tuple(value.shape), value.device.type, value.requires_grad
    if value.layout is not torch.strided:
        raise UncacheableError(f"a tensor of layout {value.layout} cannot be hashed; pass its indices and values")
    if value.is_quantized:
        raise UncacheableError("a quantized tensor cannot be hashed; pass its `int_repr()`, scale and zero point")
    flat = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return Composite(b"a", (*about, flat.view(torch.uint8).numpy() if flat.numel() else b""))


def _sparse(value: Any) -> Composite:
    """By shape and entries in one order, however they lie."""
    entries = value.tocoo(copy=True)
    entries.sum_duplicates()
    coordinates = getattr(entries, "coords", None) or (entries.row, entries.col)
    return Composite(b"a", (tuple(value.shape), entries.data, *(each.astype("<i8") for each in coordinates)))


def _image(value: Any) -> Composite:
    palette = value.getpalette() if value.mode in ("P", "PA") else None
    return Composite(b"a", (value.info, value.mode, value.size, palette, value.tobytes()), ("info",), ".{}")


KNOWN: dict[tuple[str, str], Callable[[Any], Encoded]] = {
    ("decimal", "Decimal"): _decimal,
    ("fractions", "Fraction"): lambda value: whole(value.numerator) + whole(value.denominator),
    ("ipaddress", "_IPAddressBase"): _as_text,
    ("pathlib", "PurePath"): _as_text,
    ("random", "Random"): lambda value: Composite(b"a", value.getstate()),
    ("typing", "ForwardRef"): fields("__forward_arg__"),
    ("typing", "TypeVar"): fields("__name__"),
    ("typing", "_BaseGenericAlias"): _alias,
    ("typing", "_SpecialForm"): fields("_name"),
    ("uuid", "UUID"): lambda value: raw(value.bytes),
    ("numpy", "BitGenerator"): fields("state"),
    ("numpy", "Generator"): fields("bit_generator"),
    ("numpy", "MaskedArray"): _masked,
    ("numpy", "RandomState"): lambda value: Composite(b"a", (value.get_state(legacy=False),), ("",), "{}"),
    ("numpy", "SeedSequence"): fields("state"),
    ("numpy", "_ArrayFunctionDispatcher"): fields("__module__", "__qualname__"),
    ("numpy", "bytes_"): _ndarray,
    ("numpy", "dtype"): _dtype,
    ("numpy", "generic"): _ndarray,
    ("numpy", "memmap"): _ndarray,
    ("numpy", "ndarray"): _ndarray,
    ("numpy", "str_"): _ndarray,
    ("numpy", "ufunc"): fields("__name__"),
    ("pandas", "DataFrame"): _frame,
    ("pandas", "ExtensionArray"): _pandas_array,
    ("pandas", "Index"): _index,
    ("pandas", "Interval"): fields("left", "right", "closed"),
    ("pandas", "NAType"): lambda value: b"",
    ("pandas", "NaTType"): lambda value: b"",
    ("pandas", "Period"): fields("ordinal", "freqstr"),
    ("pandas", "Series"): _series,
    ("pandas", "Timedelta"): fields("asm8"),
    ("pandas", "Timestamp"): fields("asm8", "tzinfo", "fold"),
    ("polars", "DataFrame"): lambda value: Composite(head(b"a", value.width), value.get_columns()),
    ("polars", "Series"): _polars_series,
    ("torch", "Module"): fields("_parameters", "_buffers", "_modules"),
    ("torch", "Tensor"): _tensor,
    ("torch", "device"): _as_text,
    ("torch", "dtype"): _as_text,
    ("scipy", "_spbase"): _sparse,
    ("scipy", "spmatrix"): _sparse,
    ("PIL", "Image"): _image,
    ("pydantic", "BaseModel"): lambda value: Composite(b"a", (getattr(value, "__pydantic_extra__", None),), ()),
    ("pydantic", "SecretBytes"): lambda value: raw(value.get_secret_value()),
    ("pydantic", "SecretStr"): lambda value: text(value.get_secret_value()),
    ("pydantic", "_BaseUrl"): _as_text,
    ("pydantic_core", "Url"): _as_text,
    ("pydantic_core", "MultiHostUrl"): _as_text,
}

WHOLE = sys.stdlib_module_names | {"sklearn"}
"""Packages whose classes keep content in private attributes: all count, unlike in those of users."""

STATELESS = {"PIL", "pandas", "polars", "scipy"}
"""Packages whose classes show in public attributes what their content tells already, or what varies with its use."""
