"""The envelope around every cached value: what is not whole, or not signed as it must be, is never opened."""

import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypernodes.cache._envelope import HEADER_SIZE, Refused, read_header, seal, unseal

KEY = "ab" * 32
OTHER_KEY = "cd" * 32
SECRETS = [None, b"secret"]


def sealed(key=KEY, codec=3, meta=b'{"node": "f"}', payload=(b"some ", b"payload"), secret=None):
    """An envelope in one piece."""
    return b"".join(seal(key, codec, meta, list(payload), secret))


def with_right_checksum(data, signed):
    """Those bytes with the checksum that fits them, as whoever writes an entry by hand would set it."""
    end = len(data) - 32 * signed
    return data[:4] + zlib.crc32(data[8:end]).to_bytes(4, "little") + data[8:]


@given(
    st.text("0123456789abcdef", min_size=64, max_size=64),
    st.integers(0, 255),
    st.binary(),
    st.lists(st.binary(max_size=200), max_size=4),
    st.sampled_from(SECRETS),
)
def test_what_is_sealed_is_unsealed(key, codec, meta, payload, secret):
    """Codec, meta block and payload come back, the latter in one piece."""
    data = sealed(key, codec, meta, payload, secret)
    assert unseal(key, data, secret) == (codec, b"".join(payload))
    assert data[HEADER_SIZE : HEADER_SIZE + read_header(data).meta_size] == meta


@pytest.mark.parametrize("secret", SECRETS)
def test_the_payload_is_not_copied(secret):
    """A large payload's buffers go in as they are, and out as a view of what was read."""
    large = bytearray(1 << 20)
    pieces = seal(KEY, 1, b"", [large], secret)
    assert any(piece is large for piece in pieces)
    data = b"".join(pieces)
    assert unseal(KEY, data, secret)[1].obj is data


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_is_unsealed(kind, secret):
    """What a store gives may be bytes, a bytearray or a memoryview."""
    assert bytes(unseal(KEY, kind(sealed(secret=secret)), secret)[1]) == b"some payload"


@pytest.mark.parametrize("secret", SECRETS)
def test_buffers_of_numbers_are_counted_in_bytes(secret):
    """A payload may be a view whose items are wider than a byte."""
    numbers = memoryview(bytearray(range(16))).cast("I")
    assert unseal(KEY, sealed(payload=[numbers], secret=secret), secret)[1] == bytes(range(16))


def test_an_array_begins_where_it_should():
    """With a meta block of 16 bytes or a multiple of it, a payload begins at such a multiple too."""
    assert HEADER_SIZE % 16 == 0


@pytest.mark.parametrize("secret", SECRETS)
def test_every_flipped_bit_is_found(secret):
    """No bit of an envelope can change without its being refused."""
    whole = sealed(secret=secret)
    unseal(KEY, whole, secret)
    for bit in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Refused):
            unseal(KEY, flipped, secret)


@pytest.mark.parametrize("secret", SECRETS)
def test_every_truncation_is_found(secret):
    """An envelope that ends too soon, or too late, is torn."""
    whole = sealed(secret=secret)
    for size in range(len(whole)):
        with pytest.raises(Refused, match=r"torn|damaged") as refused:
            unseal(KEY, whole[:size], secret)
        assert refused.value.damaged
    with pytest.raises(Refused, match="torn"):
        unseal(KEY, whole + b"\0", secret)


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("size", [0, 1, 31, 32, 100, 5000])
def test_bytes_that_are_no_envelope_are_refused(size, secret):
    """Nothing, zeros and noise are refused."""
    for data in (bytes(size), random.Random(size).randbytes(size)):
        with pytest.raises(Refused) as refused:
            unseal(KEY, data, secret)
        assert refused.value.damaged


@pytest.mark.parametrize("secret", SECRETS)
def test_an_entry_of_another_key_is_refused(secret):
    """An envelope that was moved to another key is whole, and yet not opened."""
    with pytest.raises(Refused, match="another key") as refused:
        unseal(OTHER_KEY, sealed(secret=secret), secret)
    assert not refused.value.damaged


@pytest.mark.parametrize(
    ("written", "read", "reason"),
    [
        (b"secret", b"another", "altered, or signed with another key"),
        (None, b"secret", "not signed"),
        (b"secret", None, "a key that this cache does not have"),
    ],
)
def test_only_ones_own_signature_is_trusted(written, read, reason):
    """Unsigned entries are not for a cache with a key, nor signed ones for a cache without; neither is damaged."""
    with pytest.raises(Refused, match=reason) as refused:
        unseal(KEY, sealed(secret=written), read)
    assert not refused.value.damaged


def test_what_was_altered_with_care_is_refused():
    """With the checksum set right, no byte before the signature can change, nor can one say that there is none."""
    whole = sealed(secret=b"secret")
    for position in range(8, len(whole) - 32):
        altered = bytearray(whole)
        altered[position] ^= 1
        with pytest.raises(Refused):
            unseal(KEY, with_right_checksum(bytes(altered), True), b"secret")
    unsigned = bytearray(whole[:-32])
    unsigned[10] = 0
    with pytest.raises(Refused, match="not signed"):
        unseal(KEY, with_right_checksum(bytes(unsigned), False), b"secret")


def test_a_damaged_signed_entry_is_told_from_a_foreign_one():
    """A wrong checksum says damaged, also where the signature is wrong as well."""
    damaged = bytearray(sealed(secret=b"secret"))
    damaged[50] ^= 1
    with pytest.raises(Refused, match="damaged") as refused:
        unseal(KEY, damaged, b"secret")
    assert refused.value.damaged


def test_another_version_is_refused_and_kept():
    """An envelope of a later version is no business of ours: not opened, not called damaged."""
    later = bytearray(sealed())
    later[8] = 2
    with pytest.raises(Refused, match="another version") as refused:
        unseal(KEY, with_right_checksum(bytes(later), False), None)
    assert not refused.value.damaged


def test_large_payloads_are_signed_as_small_ones_are():
    """Hashing at once or piece by piece gives signatures that fit, whatever the pieces were."""
    large = random.Random(1).randbytes(300_000)
    for pieces in ([large], [large[:7], large[7:100_000], large[100_000:]]):
        data = sealed(payload=pieces, secret=b"secret")
        assert unseal(KEY, data, b"secret")[1] == large
        with pytest.raises(Refused):
            unseal(KEY, data[:-1] + bytes([data[-1] ^ 1]), b"secret")


def test_the_secret_is_nowhere_in_it():
    """Neither an envelope nor a reason shows the secret."""
    data = sealed(secret=b"a rather long secret")
    assert b"rather" not in data
    with pytest.raises(Refused) as refused:
        unseal(KEY, data, b"another rather long secret")
    assert "rather" not in str(refused.value)


def test_a_header_is_read_without_the_payload():
    """The front of an envelope says what it holds."""
    header = read_header(sealed(secret=b"secret")[:HEADER_SIZE])
    assert (header.codec, header.signed, header.meta_size, header.payload_size) == (3, True, 13, 12)
    for front in (b"", b"hnc", bytes(100)):
        with pytest.raises(Refused):
            read_header(front)
